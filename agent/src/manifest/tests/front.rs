//! What a process says about requests: how many answer, and whether it sleeps without any.

use epagent_core::spec::Listen;

use super::*;

fn routed(more: &str) -> String {
    let route = "[[route]]\nhost = \"a.example\"\nprocess = \"web\"\n";
    format!("app = \"a\"\nimage = \"i\"\n[process.web]\ncommand = \"true\"\n{more}\n{route}")
}

#[test]
fn a_process_that_may_sleep_says_when() {
    for (text, instances, idle_after_ms) in [
        ("instances = { min = 0 }", 1, 300_000),
        ("instances = { min = 0, max = 3, idle_after = \"90s\" }", 3, 90_000),
    ] {
        let spec = parse(&routed(text)).unwrap_or_else(|error| panic!("{error}"));
        let web = &spec.processes[&"web".parse().unwrap()];
        assert_eq!((web.instances, &web.sleep), (instances, &Some(SleepSpec { idle_after_ms })), "{text}");
    }
    let spec = parse(&routed("instances = 2")).unwrap();
    assert_eq!(spec.processes[&"web".parse().unwrap()].sleep, None);
}

#[test]
fn a_sleep_that_makes_no_sense_is_refused() {
    check(&routed("instances = { min = 1 }"), (5, 21), "`min` can only be 0", "instances = 2");
    check(&routed("instances = { max = 2 }"), (5, 13), "the key `min` is missing", "min = 0");
    check(&routed("instances = { min = 0, max = 0 }"), (5, 30), "it may be 1 to 64", "");
    check(&routed("instances = { min = 0, idle_after = \"0s\" }"), (5, 37), "it may be 1s to 24h", "");
    check(&routed("instances = { min = 0, idle = \"5m\" }"), (5, 24), "unknown key `idle`", "");
    let unrouted = "app = \"a\"\nimage = \"i\"\n[process.web]\ncommand = \"true\"\ninstances = { min = 0 }";
    check(unrouted, (5, 13), "nothing would ever wake it", "[[route]]");
}

#[test]
fn a_process_says_where_it_listens() {
    let listen = |text: &str| {
        let spec = parse(&routed(text)).unwrap_or_else(|error| panic!("{error}"));
        spec.processes[&"web".parse().unwrap()].listen
    };
    assert_eq!(
        [listen(""), listen("listen = \"tcp\""), listen("listen = \"unix\"")].map(|l| l == Listen::Unix),
        [false, false, true]
    );
    check(&routed("listen = \"unx\""), (5, 10), "`process.web.listen` can't be `unx`", "`unix`");
    let unrouted = "app = \"a\"\nimage = \"i\"\n[process.web]\ncommand = \"true\"\nlisten = \"unix\"";
    check(unrouted, (5, 10), "nobody would connect", "[[route]]");
}
