//! Every error code, with what it means, why it happens and what to do: the text of `epagent explain`.
//!
//! Codes are stable: scripts branch on them. All of them are here, whoever gives them: the agent's API, the verdict
//! of a deploy, the error table, this command. A test of [`super::explain`] looks through the sources for one that
//! is not.

/// One code.
pub struct Code {
    pub code: &'static str,
    pub what: &'static str,
    pub why: &'static str,
    pub next: &'static str,
}

const fn code(code: &'static str, what: &'static str, why: &'static str, next: &'static str) -> Code {
    Code { code, what, why, next }
}

/// In the order of the alphabet.
pub const CODES: &[Code] = &[
    code(
        "agent_error",
        "A deploy failed, and the agent did not say why.",
        "A fault in the agent itself.",
        "`epagent errors` has what it noted; please report it.",
    ),
    code(
        "agent_unreachable",
        "The agent's API can't be reached, or went away in the middle of a request.",
        "No agent runs, it listens on another socket, or it is being restarted. Apps run on without it.",
        "Name its socket by --socket or EPAGENT_SOCKET; `epagent doctor` looks for the cause; then see its log.",
    ),
    code(
        "already_running",
        "`epagent dev` was started on a state folder that another one has.",
        "One folder holds one node, and two processes would write over each other.",
        "End the other one, or name another folder with --state.",
    ),
    code(
        "already_set_up",
        "`epagent init` was run on a machine that is set up.",
        "A second pool or other ids would lose every app, so it refuses.",
        "Change the files in /etc/epagent instead, and restart what reads them.",
    ),
    code(
        "app_removed",
        "The app is being destroyed.",
        "It was destroyed a moment ago, and its instances are still ending.",
        "Wait until `epagent apps` does not list it any more.",
    ),
    code(
        "app_trouble",
        "The agent could not make an app what it should be.",
        "Its message in `epagent errors` says what was attempted and why it failed.",
        "Mend what it names; the agent tries again by itself.",
    ),
    code(
        "archive_refused",
        "The deployed archive was not unpacked.",
        "It holds something an app's archive must not: a path with `..`, an absolute path, a link that leads out, a \
         device, too much data; or it is cut short.",
        "Deploy an archive without the entry that is named.",
    ),
    code(
        "bad_config",
        "The configuration of a daemon can't be read.",
        "A key is unknown, a value has the wrong kind, or others than root can write to a file.",
        "Put right the line that is named. Daemons that run keep what they read at their start.",
    ),
    code(
        "bad_manifest",
        "The epagent.toml or Procfile is not valid.",
        "An unknown key, a value of the wrong kind, or something it refers to that is not in it.",
        "Correct the line that is shown. Nothing was changed.",
    ),
    code(
        "bad_name",
        "A name is not valid.",
        "Names of apps, processes, volumes and images are also host names, file names and cgroups: a-z, 0-9 and inner \
         hyphens only.",
        "Choose another name.",
    ),
    code(
        "bad_node",
        "A node number is not in 1 to 127.",
        "Every kernel object, address and id of a node is derived from it.",
        "Give each machine a number of its own with --node.",
    ),
    code(
        "bad_pool",
        "The folder named for the pool can't hold it.",
        "It has to be an absolute path on a btrfs: snapshots and quotas of apps are made with it.",
        "Name another folder, or leave --pool out: then a file is made.",
    ),
    code(
        "bad_request",
        "The agent did not understand a request.",
        "A field is missing, unknown or out of its bounds, or the command and the agent are of different versions.",
        "`epagent version` compares them; the API's documentation lists what each request takes.",
    ),
    code(
        "bad_route",
        "A host, a port or what is to be done with it is not valid.",
        "It is no host name or port, a status or size is out of its bounds, or HTTP was asked of a port of plain TCP.",
        "`epagent help route` shows what each command takes.",
    ),
    code(
        "bad_size",
        "A size is not written as one.",
        "Sizes are a number and K, M, G or T, in powers of 1024.",
        "Write 6G or 512M.",
    ),
    code(
        "bad_state_folder",
        "A folder can't hold the state of a node.",
        "It holds something else, others than root can write to it, or its path is too long for unix sockets.",
        "Name a new or empty folder of root's with a short path.",
    ),
    code(
        "balancer_away",
        "The balancer can't be asked.",
        "It is being restarted, or can't start.",
        "Try again in a moment; then see its log. Listening sockets are kept meanwhile.",
    ),
    code(
        "balancer_refused",
        "The balancer did not do what it was asked.",
        "Its own message says why: a handover whose new process did not come up, or a request of another version.",
        "See the balancer's log. What it has serves on.",
    ),
    code(
        "build_failed",
        "A command of `[build]` failed.",
        "It ended with another code than 0, ran out of memory, disk or time, or was not found in the image.",
        "Its last lines were shown; `epagent logs APP --build dN` has all of them.",
    ),
    code(
        "canceled",
        "The deploy was given up for something newer.",
        "The operator canceled it, a newer deploy took its place, the app was destroyed, or its upload never came.",
        "Deploy again.",
    ),
    code(
        "command_not_found",
        "A command is not in the image.",
        "The image does not have the program, or it is not on the PATH of the app.",
        "`epagent run APP -- /bin/sh` looks around in the release; make an image that has it.",
    ),
    code(
        "deploy_under_way",
        "A deploy of this app is not over yet.",
        "One app is changed by one deploy at a time.",
        "Watch it with `epagent deploy --watch N`, wait, or end it with `epagent deploy --cancel N`.",
    ),
    code(
        "empty_secret",
        "The value given for a secret is empty.",
        "Most often a file or a pipe that held nothing.",
        "Give a value; `epagent secrets unset` removes a secret.",
    ),
    code(
        "exited",
        "An instance ended before it was healthy.",
        "The app stopped by itself: a fault in it, a missing setting, a wrong command.",
        "Its exit code and last lines were shown; `epagent logs APP` has more.",
    ),
    code(
        "forbidden",
        "The caller may not do this.",
        "admin.sock is for root and the group epagent; read.sock takes reads only.",
        "Use admin.sock, as root or as a member of its group.",
    ),
    code(
        "garbled",
        "The agent's answer was not understood.",
        "The command and the agent are of versions too far apart.",
        "`epagent version` shows both; upgrade the older one.",
    ),
    code(
        "image_failed",
        "An image could not be made.",
        "Its archive was refused, or the packages could not be fetched or installed.",
        "The last lines say which; nothing was changed.",
    ),
    code(
        "interrupted",
        "It was ended by Ctrl-C.",
        "Somebody pressed it.",
        "What was only being watched goes on.",
    ),
    code(
        "left_behind",
        "`epagent dev` ended and something of it still exists.",
        "The teardown failed or was killed; DIR/log/epagent-runner.log says how.",
        "Start it on the same folder and end it again: it then finds what is left and removes it.",
    ),
    code(
        "listen_failed",
        "The address for HTTP can't be listened on.",
        "Something else listens there, or it is no address of this host.",
        "Choose another with --http.",
    ),
    code(
        "loop_failed",
        "A loop of the agent ended with an error and was started again.",
        "Its message and backtrace are in `epagent errors --json`.",
        "Nothing, when it happened once. Report it when it repeats.",
    ),
    code(
        "missing_image",
        "The manifest names an image that does not exist.",
        "It was never made on this node, or was removed.",
        "`epagent image ls` lists them; `epagent image bootstrap` and `epagent image import` make one.",
    ),
    code(
        "missing_secret",
        "The manifest asks for a secret that is not set.",
        "Secrets are set apart from the files of the app.",
        "`epagent secrets set APP NAME`, then deploy again.",
    ),
    code(
        "no_app_sockets",
        "The manifest has a process listen on a unix socket, and this node can't do that safely.",
        "Before Linux 6.16 a tenant could hold up the balancer by sending descriptors along; or the runner is not told \
         the balancer's group.",
        "Leave `listen` out; `epagent doctor` shows what is missing.",
    ),
    code(
        "no_binary",
        "A program of epagent is missing.",
        "All of them lie in one folder, beside the `epagent` command.",
        "Build all of them with `make build`.",
    ),
    code(
        "no_btrfs",
        "This kernel has no btrfs.",
        "The pool is a btrfs.",
        "`modprobe btrfs`, or another kernel.",
    ),
    code(
        "no_manifest",
        "There is neither an epagent.toml nor a Procfile.",
        "A deploy needs to be told how the app is run.",
        "Put one at the top of the folder or archive; `examples/` has some.",
    ),
    code(
        "no_node",
        "Every node number is taken.",
        "127 agents run on this kernel, or ones that were killed left their cgroups.",
        "End some. An agent's folder that is started and ended again cleans up after itself.",
    ),
    code(
        "no_page",
        "The page can't be used.",
        "The file can't be read, is no text, or is longer than 64 KiB.",
        "Name another; serve larger pages by an app.",
    ),
    code(
        "no_program",
        "A program this host needs is not installed.",
        "The pool is made with btrfs-progs, the network with nftables.",
        "Install the package that is named.",
    ),
    code(
        "no_release",
        "There is no release to do this with.",
        "Nothing was deployed yet, or the release that was named is gone.",
        "`epagent releases APP` lists what there is; `epagent deploy DIR` makes one.",
    ),
    code(
        "no_secret",
        "The value of a secret can't be read.",
        "The file or pipe could not be read.",
        "Give it again.",
    ),
    code(
        "no_source",
        "What was to be deployed can't be read.",
        "The path does not exist, or is closed to you.",
        "Name a folder or an archive.",
    ),
    code(
        "no_space",
        "There is no room left.",
        "The pool, or the disk the agent's state is on, is full. Part of the pool is kept for the agent.",
        "Remove releases, images or volumes; `epagent status` shows how full the pool is.",
    ),
    code(
        "no_such_app",
        "There is no app of this name.",
        "It was never deployed here, or was destroyed.",
        "`epagent apps` lists them.",
    ),
    code(
        "no_such_code",
        "There is no error code of this name.",
        "It is misspelt, or of another version.",
        "`epagent explain` lists all of them.",
    ),
    code(
        "no_systemd",
        "`epagent init` was run where systemd is not the first process.",
        "The installed node is a set of systemd units.",
        "`epagent dev --state DIR` runs a whole node without systemd.",
    ),
    code(
        "no_terminal",
        "A question could not be asked.",
        "There is no terminal, or it failed.",
        "Give the answer on the command line: --yes, --from-file.",
    ),
    code(
        "no_user",
        "A user or group of the package does not exist.",
        "Its sysusers file was not applied.",
        "Run `systemd-sysusers`, or install the package again.",
    ),
    code(
        "not_confirmed",
        "The name was not typed back.",
        "Something else was typed.",
        "Nothing was changed.",
    ),
    code(
        "not_found",
        "What was named does not exist.",
        "A process, instance, deploy or volume of another name.",
        "List what there is and name one of it.",
    ),
    code(
        "not_held",
        "There is no hold of an operator's to end.",
        "Nothing was said about this host or port, or something else than a hold.",
        "`epagent route ls` shows what is in force; `epagent route clear` takes back any word.",
    ),
    code(
        "not_root",
        "`epagent dev` was started by another user than root.",
        "It makes namespaces, cgroups and mounts.",
        "Run it as root.",
    ),
    code(
        "not_scaled",
        "The instances that were asked for are not all healthy yet.",
        "They start slowly, fail, or there is no room for them.",
        "The agent goes on; `epagent ps` and `epagent logs APP` show why.",
    ),
    code(
        "not_started",
        "An instance was asked for and did not come to run in time.",
        "The runner could not set up its jail, or the disk or the machine is stalled.",
        "`epagent doctor` and the runner's log tell which.",
    ),
    code(
        "old_kernel",
        "The kernel is too old.",
        "epagent needs 6.1, which Debian 12 has.",
        "Boot a newer kernel.",
    ),
    code(
        "out_of_memory",
        "An instance or a command used more memory than it may.",
        "Its limit is `[process.NAME.limits] memory`, or that of the build.",
        "Raise the limit, or have it use less.",
    ),
    code(
        "output_failed",
        "The result could not be written.",
        "The disk or pipe behind stdout failed.",
        "Try again.",
    ),
    code(
        "pack_failed",
        "The files could not be packed.",
        "One can't be read, is a socket, a pipe or a device, or changed while it was read.",
        "Mend the file that is named, or leave it out by .epagentignore.",
    ),
    code(
        "past_deadline",
        "A command took longer than it may.",
        "Builds have the deadline of the runner's configuration.",
        "Make it faster, or raise `[build] deadline`.",
    ),
    code(
        "port_taken",
        "`epagent init` was to listen where somebody else's server does.",
        "Each address takes HTTP for one server.",
        "`ss -ltnp` shows whose it is; stop it, or name other addresses with --listen.",
    ),
    code(
        "refused",
        "The runner did not carry out a request.",
        "Something of the name does not exist or is in use, or a bound was reached; its message says which.",
        "Mend what it names.",
    ),
    code(
        "release_failed",
        "The command of `[release]` failed.",
        "It ended with another code than 0, was killed, or was not found.",
        "Its last lines were shown; the release that served before serves on.",
    ),
    code(
        "route_refused",
        "The balancer does not take a route.",
        "It breaks one of the balancer's rules, which its own message names. What was in force before stays in force, \
         and all other routes are not held back by it.",
        "Change what it names: the app's manifest, or what was said by `epagent route`.",
    ),
    code(
        "route_taken",
        "A route of the manifest belongs to another app.",
        "One host name or port leads to one app.",
        "Choose another, or remove that app's route first.",
    ),
    code(
        "runner_away",
        "The agent can't reach its runner.",
        "The runner is being restarted, or can't start. Instances run on.",
        "Try again in a moment; then see the runner's log.",
    ),
    code(
        "runner_confused",
        "The runner gave an answer the agent did not expect.",
        "The two are of different versions, or one has a fault.",
        "`epagent version` compares them; see the runner's log.",
    ),
    code(
        "start_failed",
        "A jail or a command in it could not be started.",
        "The message says at which step.",
        "`epagent errors` has more.",
    ),
    code(
        "store_failed",
        "The agent's own state could not be read or written.",
        "Its disk is full or failing, or the file is of a newer version.",
        "See the agent's log, and that its disk has room.",
    ),
    code(
        "system_error",
        "The system refused something `epagent dev` needs.",
        "The message names the step and the system's own reason.",
        "Mend what it names.",
    ),
    code(
        "systemctl_failed",
        "A call of systemctl failed.",
        "A unit could not be loaded or started; its message is shown.",
        "`systemctl status 'epagent*'` and `journalctl -u 'epagent*'` say more.",
    ),
    code(
        "table_not_taken",
        "The balancer did not take a new table.",
        "It is being restarted, or a port of a route can't be listened on. What it has serves on.",
        "`epagent doctor` names the port.",
    ),
    code(
        "takes_long",
        "Instances have not ended yet.",
        "They use all the grace they have.",
        "`epagent ps` shows them.",
    ),
    code(
        "too_large",
        "The archive is larger than what is taken.",
        "A bound on uploads keeps one app from filling the node's disk.",
        "Leave out what the app does not need by .epagentignore.",
    ),
    code(
        "too_late",
        "A deploy can't be canceled any more.",
        "Its release serves already, or it is over.",
        "`epagent rollback APP` returns to the release before.",
    ),
    code(
        "try_again",
        "A deploy went on while it was to be canceled.",
        "It passed from one phase to the next in that moment.",
        "Cancel it again.",
    ),
    code(
        "unequal_ids",
        "The user epagentd and its group have different numbers.",
        "The runner lets the group of the brain's number read logs. The numbers were taken when the package was installed.",
        "Give both one number with usermod and groupmod, and run `epagent init` again.",
    ),
    code(
        "unhealthy",
        "An instance runs and did not become healthy in time.",
        "Its check fails: it answers with an error, too slowly, or not at all.",
        "The last result of the check was shown; `[process.NAME.health]` sets path, timeout and deadline.",
    ),
    code(
        "upgrade_required",
        "A request for exec or run was made without its protocol.",
        "Both change the connection to frames.",
        "Use `epagent exec` or `epagent run`.",
    ),
    code(
        "upload_failed",
        "The archive could not be stored.",
        "The agent's disk failed or is full.",
        "See that it has room, and deploy again.",
    ),
    code(
        "usage",
        "The command line makes no sense.",
        "Something is missing, or can't be had together.",
        "`epagent help COMMAND` shows what it takes.",
    ),
    code(
        "wrong_port",
        "The app listens on another port or address than it was told.",
        "It must listen on 0.0.0.0 or its own address, at $PORT; 127.0.0.1 is not reached from outside of the instance.",
        "Have it read $PORT.",
    ),
];
