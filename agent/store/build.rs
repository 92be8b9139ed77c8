//! Has Cargo build the crate again when a migration is added, which it can't see by itself.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
