#compdef castra
# zsh completions for castra, printed by `castra completions zsh`

_castra_vms() {
    local -a vms
    vms=(${(f)"$(castra vm-names 2>/dev/null)"})
    compadd -a vms
}

_castra() {
    local -a globals words_known
    local context state state_descr line
    typeset -A opt_args
    globals=(
        '*--config=[use this castra.toml, or the one in this directory]:PATH:_files'
        '*--workspace=[use the project with this id, wherever its folder is]:ID: '
        '--json[print results and events as JSON, one object per line]'
        '--quiet[print only results, warnings and errors]'
        '*--color=[colour the text\: auto, always or never (default\: auto)]:WHEN:(auto always never)'
        '--help[print help; -h in short, --help in full]'
        '--version[print the version]'
    )
    _arguments -C $globals '1:command:->command' '*::argument:->argument' && return
    case $state in
    command)
        words_known=(
            'init:write a castra.toml to start from'
            'up:start VMs, wait until they are reachable, and bootstrap them'
            'down:shut VMs down and discard their overlays'
            'restart:shut VMs down and start them again, with their disks'
            'clean:remove what is left of projects that don'\''t run'
            'bootstrap:bootstrap running VMs again'
            'ssh:open a shell in a VM, or run a command there'
            'exec:run a command in a VM, without a terminal'
            'cp:copy files into or out of a VM'
            'ssh-config:print an ssh_config for running VMs'
            'console:attach to the serial console of a VM'
            'status:show which VMs run and which are reachable'
            'wait:wait until VMs are reachable, bootstrapped or stopped'
            'ports:show which host ports are wanted, in use or in conflict'
            'logs:show the logs of VMs, broker and bus'
            'events:show what castra and the broker have reported'
            'doctor:look for what keeps VMs from running well'
            'report:show the last runs\: timelines, failures, traffic on the bus'
            'workspaces:list the projects castra knows, wherever they are'
            'broker:run the project'\''s broker in the foreground'
            'completions:print the completions for a shell'
            'man:show the man page, that of a command or of castra.toml'
            'image:castra'\''s default guest, for VMs without an image of their own'
            'harness:a coding agent that works with the VMs'
            'bus:messages between host and guests, ordered and logged'
        )
        _describe -t commands command words_known ;;
    argument)
        case $line[1] in
        init)
            _arguments $globals \
                '--force[overwrite an existing castra.toml]' \
                '*--project-name=[name the project (default\: the folder'\''s name)]:NAME: ' \
                '*--output=[write this file instead of castra.toml]:PATH:_files' \
                ;;
        up)
            _arguments $globals \
                '--force[start even if memory is short]' \
                '*--bootstrap=[override when VMs are bootstrapped\: auto, skip, always]:MODE|VM=MODE:(auto skip always)' \
                '--plan[show what would be done, and change nothing]' \
                '--recreate[restart VMs whose settings in castra.toml have changed]' \
                '--broker-only[start the broker and no VM]' \
                '--verbose[print every step]' \
                '*:VM:_castra_vms';;
        down)
            _arguments $globals \
                '*--graceful-wait-secs=[how long a guest may take to power off]:SECS: ' \
                '*--sigterm-wait-secs=[how long QEMU may take after SIGTERM]:SECS: ' \
                '*--sigkill-wait-secs=[how long QEMU may take after SIGKILL]:SECS: ' \
                '--discard[also discard persistent disks]' \
                '--verbose[print every step]' \
                '*:VM:_castra_vms';;
        restart)
            _arguments $globals \
                '--force[start even if memory is short]' \
                '*--bootstrap=[override when VMs are bootstrapped\: auto, skip, always]:MODE|VM=MODE:(auto skip always)' \
                '*--graceful-wait-secs=[how long a guest may take to power off]:SECS: ' \
                '*--sigterm-wait-secs=[how long QEMU may take after SIGTERM]:SECS: ' \
                '*--sigkill-wait-secs=[how long QEMU may take after SIGKILL]:SECS: ' \
                '--discard[start with fresh disks]' \
                '--verbose[print every step]' \
                '*:VM:_castra_vms';;
        clean)
            _arguments $globals \
                '--force[also remove persistent disks]' \
                '--dry-run[show what would be removed, and remove nothing]' \
                '--global[clean every project, and what all projects share]' \
                '*--state-root=[clean the project with this state root]:PATH:_files' \
                '--no-logs[keep the logs]' \
                '--no-handshakes[keep the guests'\'' handshake records]' \
                ;;
        bootstrap)
            _arguments $globals \
                '*--bootstrap=[override when VMs are bootstrapped\: auto, skip, always]:MODE|VM=MODE:(auto skip always)' \
                '--plan[show what would be done, and change nothing]' \
                '--verbose[print every step]' \
                '*:VM:_castra_vms';;
        ssh)
            _arguments $globals \
                '1:VM:_castra_vms';;
        exec)
            _arguments $globals \
                '1:VM:_castra_vms';;
        cp)
            _arguments $globals \
                '1:SRC:_files';;
        ssh-config)
            _arguments $globals \
                '*--prefix=[put this before the VMs'\'' names, as in demo-web]:TEXT: ' \
                '*:VM:_castra_vms';;
        console)
            _arguments $globals \
                '--raw[pass on everything that the guest writes]' \
                '*:VM:_castra_vms';;
        status)
            _arguments $globals \
                '--watch[print again every 2 s until Ctrl-C]' \
                '--wide[show every column, and what guests measure]' \
                '--legend[explain the columns below the table]' \
                '--all[show every project castra knows]' \
                ;;
        wait)
            _arguments $globals \
                '*--timeout=[give up after this long (default\: 5m)]:TIME: ' \
                '*--for=[what to wait for\: reachable (default), bootstrapped or stopped]:STATE:(reachable bootstrapped stopped)' \
                '*:VM:_castra_vms';;
        ports)
            _arguments $globals \
                '--all[show every project castra knows]' \
                '--active[show only ports that are in use now]' \
                '--verbose[show processes, and which projects want the same port]' \
                ;;
        logs)
            _arguments $globals \
                '*--source=[show only this log\: serial, qemu, bootstrap, broker or bus]:SOURCE:(serial qemu bootstrap broker bus)' \
                '*--tail=[show only the last N lines of each log]:N: ' \
                '*--since=[show only what is newer\: 10m ago, or 2026-11-21T10\:00\:00Z]:WHEN: ' \
                '--follow[keep printing what is added]' \
                '*:VM:_castra_vms';;
        events)
            _arguments $globals \
                '*--tail=[show only the last N events]:N: ' \
                '*--type=[show only events of this type; `*` matches any letters]:PATTERN: ' \
                '*--vm=[show only events about this VM]:VM:_castra_vms' \
                '*--run=[show only events of this run]:ID: ' \
                '*--after=[show only events of --run with a higher number than this]:SEQ: ' \
                '*--since=[show only what is newer\: 10m ago, or 2026-11-21T10\:00\:00Z]:WHEN: ' \
                '--follow[keep printing what is added]' \
                ;;
        doctor)
            _arguments $globals \
                '--all[check every project castra knows]' \
                ;;
        report)
            _arguments $globals \
                '*--since=[show only newer runs\: 10m ago, or 2026-11-21T10\:00\:00Z]:WHEN: ' \
                '*--html=[write a page for a browser to this file; `-`\: to stdout]:FILE:_files' \
                '*--last=[show the last N runs (default\: 5, with --since up to 100)]:N: ' \
                '*:VM:_castra_vms';;
        workspaces)
            _arguments $globals \
                ;;
        broker)
            _arguments $globals \
                ;;
        completions)
            _arguments $globals \
                '1:SHELL:(bash zsh fish)';;
        man)
            _arguments $globals \
                '*--dir=[write all pages into this directory]:DIR:_files' \
                '1:PAGE:(castra.toml security)';;
        image)
            if (( CURRENT == 2 )); then
                words_known=(
                    'build:build the default guest now'
                    'list:list the images in the cache'
                    'path:print the directory of the default guest'
                )
                _describe -t commands command words_known
            else
                shift words
                (( CURRENT-- ))
                case $words[1] in
                build)
                    _arguments $globals \
                        '--force[build it again even if it is already built]' \
                        '*--arch=[the guest'\''s architecture\: x86_64 or aarch64 (default\: the host'\''s)]:NAME:(x86_64 aarch64)' \
                        '--mounts[build the default guest for VMs with mounts]' \
                        ;;
                list)
                    _arguments $globals \
                        ;;
                path)
                    _arguments $globals \
                        '*--arch=[the guest'\''s architecture\: x86_64 or aarch64 (default\: the host'\''s)]:NAME:(x86_64 aarch64)' \
                        '--mounts[print the path of the default guest for VMs with mounts]' \
                        ;;
                esac
            fi ;;
        harness)
            if (( CURRENT == 2 )); then
                words_known=(
                    'run:let Codex work with the VMs, and report what it does as events'
                    'relay:turn a recorded or piped stream of Codex into events'
                    'list:list the threads of agents in this project'
                    'show:show what was said and done in a thread'
                    'usage:add up tokens and VM time, by thread and by day'
                )
                _describe -t commands command words_known
            else
                shift words
                (( CURRENT-- ))
                case $words[1] in
                run)
                    _arguments $globals \
                        '*--agent=[the agent (default\: codex)]:NAME:(codex)' \
                        '*--codex=[the Codex to run (default\: `codex` from PATH)]:PATH:_files' \
                        '*--codex-arg=[give Codex this argument too, as in --codex-arg=--skip-git-repo-check]:ARG: ' \
                        '*--model=[the model that Codex uses]:MODEL: ' \
                        '*--resume=[continue this thread]:THREAD: ' \
                        '*--cwd=[the directory Codex works in (default\: this one)]:DIR:_files' \
                        '*--in=[run Codex inside this VM, so that the host only relays]:VM:_castra_vms' \
                        '*--timeout=[end Codex after this long (default\: never)]:TIME: ' \
                        '*--idle-timeout=[end Codex after this long without output (default\: 30m)]:TIME: ' \
                        '--no-preamble[pass Codex only the prompt]' \
                        '1:PROMPT: ';;
                relay)
                    _arguments $globals \
                        '*--agent=[the agent (default\: codex)]:NAME:(codex)' \
                        '--no-record[keep neither transcript nor events]' \
                        '1:FILE:_files';;
                list)
                    _arguments $globals \
                        ;;
                show)
                    _arguments $globals \
                        '1:THREAD: ';;
                usage)
                    _arguments $globals \
                        ;;
                esac
            fi ;;
        bus)
            if (( CURRENT == 2 )); then
                words_known=(
                    'publish:publish a message on the bus, and wait until it is logged'
                    'request:ask something on the bus, and print the first answer'
                    'subscribe:print messages as they come, or from a given number on'
                    'tail:print the last messages from the logs, and follow them'
                    'bench:measure latency and throughput of this broker'
                )
                _describe -t commands command words_known
            else
                shift words
                (( CURRENT-- ))
                case $words[1] in
                publish)
                    _arguments $globals \
                        '--force[publish even to a VM that the project doesn'\''t have]' \
                        '*--topic=[the topic of the message (default\: broadcast)]:TOPIC: ' \
                        '*--payload=[the payload, as JSON; `-` reads one message per line]:JSON: ' \
                        '*--wait=[wait up to this long for a broker, such as 30s]:SPAN: ' \
                        '1:TOPIC: ';;
                request)
                    _arguments $globals \
                        '--force[publish even to a VM that the project doesn'\''t have]' \
                        '*--wait=[wait up to this long for a broker, such as 30s]:SPAN: ' \
                        '*--timeout=[wait this long for an answer (default\: 5s)]:SPAN: ' \
                        '1:TOPIC: ';;
                subscribe)
                    _arguments $globals \
                        '*--wait=[wait up to this long for a broker, such as 30s]:SPAN: ' \
                        '*--from=[begin with the message of this number]:SEQ: ' \
                        '--last[print the newest message of each topic first]' \
                        '*--group=[share the messages with other members of this group]:NAME: ' \
                        '*--count=[end after N messages]:N: ' \
                        '1:TOPIC: ';;
                tail)
                    _arguments $globals \
                        '*--tail=[show only the last N messages]:N: ' \
                        '*--vm=[show only what this VM has published]:VM:_castra_vms' \
                        '--follow[keep printing what is added, which is the default]' \
                        '--no-follow[end after the last messages]' \
                        '*--topic=[show only messages on this topic]:TOPIC: ' \
                        '--shared[read the log of the whole bus (the default)]' \
                        ;;
                bench)
                    _arguments $globals \
                        '*--messages=[number of messages (default\: 50000)]:N: ' \
                        '*--size=[size of each payload in bytes (default\: 200)]:BYTES: ' \
                        '*--in-flight=[unacknowledged messages per publisher (default\: 64)]:N: ' \
                        '*--publishers=[number of publishers at once (default\: 1)]:N: ' \
                        ;;
                esac
            fi ;;
        esac ;;
    esac
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _castra "$@"
else
    compdef _castra castra
fi
