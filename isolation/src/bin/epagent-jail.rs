//! The monitor of one instance, its log writer and its init: see [`epagent_isolation::jail`].

fn main() {
    std::process::exit(epagent_isolation::jail::main());
}
