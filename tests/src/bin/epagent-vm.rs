//! Throwaway machines for a person: `epagent-vm shell [RELEASE]`, `epagent-vm pair [RELEASE]`.
//!
//! `shell` is one machine with the agent's binaries and its console on this terminal. `pair` is three of them on one
//! cable (two hosts and a witness) and a prompt to run commands in them, cut the cable and take their power away.
//! When it ends, they are gone.

use std::io::{BufRead, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use epagent_tests::vm::cable::Cable;
use epagent_tests::vm::payload::Payload;
use epagent_tests::vm::{Options, Release, Vm};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Leaves the console: Ctrl-], as in telnet.
const LEAVE: u8 = 0x1d;

const HELP: &str = "N COMMAND    run a command in machine N (1 to 3)
console N    the console of machine N; Ctrl-] comes back
cut N M      no frame goes between N and M; heal N M
link N off   pull the cable at N's end; link N on
power N      cut N's power; it boots again
quit";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let verb = arguments.first().map_or("", String::as_str);
    let name = arguments.get(1).map_or("trixie", String::as_str);
    let Some(release) = Release::ALL.into_iter().find(|release| release.name() == name) else {
        eprintln!("error: {name} is no release; trixie and bookworm are");
        return ExitCode::from(2);
    };
    match verb {
        "shell" => shell(release),
        "pair" => pair(release),
        _ => {
            eprintln!("usage: epagent-vm shell|pair [trixie|bookworm]");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn shell(release: Release) {
    let vm = Vm::with(release, Options { payload: Payload::agent(), ..Options::default() });
    eprintln!("{} is up after {:?}; log in as root, leave with Ctrl-]", vm.name, vm.took);
    console(&vm);
}

fn pair(release: Release) {
    let cable = Cable::with_ends(3);
    let mut machines: Vec<Vm> = ["a", "b", "witness"]
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let plug = Some(cable.plug(index));
            let vm = Vm::with(release, Options { payload: Payload::agent(), name: (*name).to_owned(), plug });
            eprintln!("{}: {name} is up, {}", index + 1, cable.plug(index).address());
            vm
        })
        .collect();
    eprintln!("{HELP}");
    let mut line = String::new();
    loop {
        eprint!("vm> ");
        line.clear();
        if !std::io::stdin().lock().read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
            return;
        }
        if !obey(line.trim(), &cable, &mut machines) {
            return;
        }
    }
}

/// Does what one line says; false when that is to end.
fn obey(line: &str, cable: &Cable, machines: &mut [Vm]) -> bool {
    let number =
        |word: &str| word.parse::<usize>().ok().filter(|n| (1..=machines.len()).contains(n)).map(|n| n - 1);
    let words: Vec<&str> = line.split_whitespace().collect();
    let numbers: Vec<usize> = words.iter().filter_map(|word| number(word)).collect();
    match (words.as_slice(), numbers.as_slice()) {
        (["quit"], _) => return false,
        (["cut", _, _], [one, other]) => cable.cut(*one, *other),
        (["heal", _, _], [one, other]) => cable.heal(*one, *other),
        (["link", _, state], [one]) => machines[*one].set_link(*state == "on"),
        (["console", _], [one]) => console(&machines[*one]),
        (["power", _], [one]) => {
            machines[*one].power_cut();
            machines[*one].succeed(&cable.plug(*one).setup());
        }
        ([first, _, ..], [one, ..]) if number(first).is_some() => {
            let script = line.split_once(char::is_whitespace).map_or("", |(_, script)| script);
            let ran = machines[*one].run(script);
            print!("{}", ran.stdout);
            eprint!("{}", ran.stderr);
            if ran.code != Some(0) {
                eprintln!("ended with {:?}", ran.code);
            }
        }
        _ => eprintln!("{HELP}"),
    }
    true
}

/// Joins this terminal and the machine's console until Ctrl-] or the end of the input.
fn console(vm: &Vm) {
    let Ok(mut port) = UnixStream::connect(vm.console()) else {
        eprintln!("error: the console of {} does not answer", vm.name);
        return;
    };
    let Ok(mut from) = port.try_clone() else { return };
    let terminal = RawTerminal::enter();
    let printing = std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(length @ 1..) = from.read(&mut bytes) {
            let mut out = std::io::stdout().lock();
            if out.write_all(&bytes[..length]).and_then(|()| out.flush()).is_err() {
                return;
            }
        }
    });
    // A line end makes the console say its prompt.
    let _ = port.write_all(b"\r");
    let mut bytes = [0; 1024];
    while let Ok(length @ 1..) = std::io::stdin().lock().read(&mut bytes) {
        let typed = &bytes[..length];
        let leave = typed.iter().position(|byte| *byte == LEAVE);
        if port.write_all(&typed[..leave.unwrap_or(length)]).is_err() || leave.is_some() {
            break;
        }
    }
    let _ = port.shutdown(std::net::Shutdown::Both);
    let _ = printing.join();
    drop(terminal);
    eprintln!();
}

/// The terminal passes every key on while this lives.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter() -> Self {
        let stdin = std::io::stdin();
        let before = stdin.is_terminal().then(|| tcgetattr(&stdin).ok()).flatten();
        if let Some(mut raw) = before.clone() {
            cfmakeraw(&mut raw);
            let _ = tcsetattr(&stdin, SetArg::TCSANOW, &raw);
        }
        Self(before)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, before);
        }
    }
}
