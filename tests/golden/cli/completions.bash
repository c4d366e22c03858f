# bash completions for castra, printed by `castra completions bash`
_castra() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= word i skip=
    COMPREPLY=()
    # bash cuts --flag=value into three words.
    if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ $word == = ]]; then skip=1; continue; fi
        if [[ -n $skip ]]; then skip=; continue; fi
        case $word in
            --) return ;;
            --config|--workspace|--color|--arch|--project-name|--prefix|--dir|--output|--bootstrap|--graceful-wait-secs|--sigterm-wait-secs|--sigkill-wait-secs|--state-root|--source|--tail|--type|--vm|--run|--after|--since|--html|--last|--agent|--codex|--codex-arg|--model|--resume|--cwd|--in|--timeout|--idle-timeout|--topic|--payload|--for|--wait|--from|--group|--timeout|--count|--messages|--size|--in-flight|--publishers) skip=1 ;;
            -*) ;;
            image) [[ -z $command ]] && command=image ;;
            build) case $command in image) command='image build' ;; '') command=build ;; esac ;;
            list) case $command in image) command='image list' ;; '') command=list ;; esac ;;
            path) case $command in image) command='image path' ;; '') command=path ;; esac ;;
            harness) [[ -z $command ]] && command=harness ;;
            run) case $command in harness) command='harness run' ;; '') command=run ;; esac ;;
            relay) case $command in harness) command='harness relay' ;; '') command=relay ;; esac ;;
            list) case $command in harness) command='harness list' ;; '') command=list ;; esac ;;
            show) case $command in harness) command='harness show' ;; '') command=show ;; esac ;;
            usage) case $command in harness) command='harness usage' ;; '') command=usage ;; esac ;;
            bus) [[ -z $command ]] && command=bus ;;
            publish) case $command in bus) command='bus publish' ;; '') command=publish ;; esac ;;
            request) case $command in bus) command='bus request' ;; '') command=request ;; esac ;;
            subscribe) case $command in bus) command='bus subscribe' ;; '') command=subscribe ;; esac ;;
            tail) case $command in bus) command='bus tail' ;; '') command=tail ;; esac ;;
            bench) case $command in bus) command='bus bench' ;; '') command=bench ;; esac ;;
            *) [[ -z $command ]] && command=$word ;;
        esac
    done
    case $prev in
        --config) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null; return ;;
        --workspace)  return ;;
        --color) COMPREPLY=($(compgen -W 'auto always never' -- "$cur")); return ;;
        --arch) COMPREPLY=($(compgen -W 'x86_64 aarch64' -- "$cur")); return ;;
        --project-name)  return ;;
        --prefix)  return ;;
        --dir) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null; return ;;
        --output) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null; return ;;
        --bootstrap) COMPREPLY=($(compgen -W 'auto skip always' -- "$cur")); return ;;
        --graceful-wait-secs)  return ;;
        --sigterm-wait-secs)  return ;;
        --sigkill-wait-secs)  return ;;
        --state-root) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null; return ;;
        --source) COMPREPLY=($(compgen -W 'serial qemu bootstrap broker bus' -- "$cur")); return ;;
        --tail)  return ;;
        --type)  return ;;
        --vm) COMPREPLY=($(compgen -W "$(castra vm-names 2>/dev/null)" -- "$cur")); return ;;
        --run)  return ;;
        --after)  return ;;
        --since)  return ;;
        --html) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null; return ;;
        --last)  return ;;
        --agent) COMPREPLY=($(compgen -W 'codex' -- "$cur")); return ;;
        --codex) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null; return ;;
        --codex-arg)  return ;;
        --model)  return ;;
        --resume)  return ;;
        --cwd) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null; return ;;
        --in) COMPREPLY=($(compgen -W "$(castra vm-names 2>/dev/null)" -- "$cur")); return ;;
        --timeout)  return ;;
        --idle-timeout)  return ;;
        --topic)  return ;;
        --payload)  return ;;
        --for) COMPREPLY=($(compgen -W 'reachable bootstrapped stopped' -- "$cur")); return ;;
        --wait)  return ;;
        --from)  return ;;
        --group)  return ;;
        --timeout)  return ;;
        --count)  return ;;
        --messages)  return ;;
        --size)  return ;;
        --in-flight)  return ;;
        --publishers)  return ;;
    esac
    case $command in
        '') COMPREPLY=($(compgen -W 'init up down restart clean bootstrap ssh exec cp ssh-config console status wait ports logs events doctor report workspaces broker completions man image harness bus --config --workspace --json --quiet --color --help --version' -- "$cur")) ;;
        image) COMPREPLY=($(compgen -W 'build list path' -- "$cur")) ;;
        harness) COMPREPLY=($(compgen -W 'run relay list show usage' -- "$cur")) ;;
        bus) COMPREPLY=($(compgen -W 'publish request subscribe tail bench' -- "$cur")) ;;
        'init') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --force --project-name --output' -- "$cur")); else :;  fi ;;
        'up') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --force --bootstrap --plan --recreate --broker-only --verbose' -- "$cur")); else :; COMPREPLY=($(compgen -W "$(castra vm-names 2>/dev/null)" -- "$cur")); fi ;;
        'down') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --graceful-wait-secs --sigterm-wait-secs --sigkill-wait-secs --discard --verbose' -- "$cur")); else :; COMPREPLY=($(compgen -W "$(castra vm-names 2>/dev/null)" -- "$cur")); fi ;;
        'restart') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --force --bootstrap --graceful-wait-secs --sigterm-wait-secs --sigkill-wait-secs --discard --verbose' -- "$cur")); else :; COMPREPLY=($(compgen -W "$(castra vm-names 2>/dev/null)" -- "$cur")); fi ;;
        'clean') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --force --dry-run --global --state-root --no-logs --no-handshakes' -- "$cur")); else :;  fi ;;
        'bootstrap') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --bootstrap --plan --verbose' -- "$cur")); else :; COMPREPLY=($(compgen -W "$(castra vm-names 2>/dev/null)" -- "$cur")); fi ;;
        'ssh') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version' -- "$cur")); else :; COMPREPLY=($(compgen -W "$(castra vm-names 2>/dev/null)" -- "$cur")); fi ;;
        'exec') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version' -- "$cur")); else :; COMPREPLY=($(compgen -W "$(castra vm-names 2>/dev/null)" -- "$cur")); fi ;;
        'cp') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version' -- "$cur")); else :; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null; fi ;;
        'ssh-config') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --prefix' -- "$cur")); else :; COMPREPLY=($(compgen -W "$(castra vm-names 2>/dev/null)" -- "$cur")); fi ;;
        'console') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --raw' -- "$cur")); else :; COMPREPLY=($(compgen -W "$(castra vm-names 2>/dev/null)" -- "$cur")); fi ;;
        'status') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --watch --wide --legend --all' -- "$cur")); else :;  fi ;;
        'wait') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --timeout --for' -- "$cur")); else :; COMPREPLY=($(compgen -W "$(castra vm-names 2>/dev/null)" -- "$cur")); fi ;;
        'ports') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --all --active --verbose' -- "$cur")); else :;  fi ;;
        'logs') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --source --tail --since --follow' -- "$cur")); else :; COMPREPLY=($(compgen -W "$(castra vm-names 2>/dev/null)" -- "$cur")); fi ;;
        'events') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --tail --type --vm --run --after --since --follow' -- "$cur")); else :;  fi ;;
        'doctor') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --all' -- "$cur")); else :;  fi ;;
        'report') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --since --html --last' -- "$cur")); else :; COMPREPLY=($(compgen -W "$(castra vm-names 2>/dev/null)" -- "$cur")); fi ;;
        'workspaces') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version' -- "$cur")); else :;  fi ;;
        'bus publish') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --force --topic --payload --wait' -- "$cur")); else :;  fi ;;
        'bus request') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --force --wait --timeout' -- "$cur")); else :;  fi ;;
        'bus subscribe') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --wait --from --last --group --count' -- "$cur")); else :;  fi ;;
        'bus tail') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --tail --vm --follow --no-follow --topic --shared' -- "$cur")); else :;  fi ;;
        'bus bench') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --messages --size --in-flight --publishers' -- "$cur")); else :;  fi ;;
        'image build') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --force --arch --mounts' -- "$cur")); else :;  fi ;;
        'image list') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version' -- "$cur")); else :;  fi ;;
        'image path') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --arch --mounts' -- "$cur")); else :;  fi ;;
        'broker') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version' -- "$cur")); else :;  fi ;;
        'harness run') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --agent --codex --codex-arg --model --resume --cwd --in --timeout --idle-timeout --no-preamble' -- "$cur")); else :;  fi ;;
        'harness relay') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --agent --no-record' -- "$cur")); else :; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null; fi ;;
        'harness list') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version' -- "$cur")); else :;  fi ;;
        'harness show') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version' -- "$cur")); else :;  fi ;;
        'harness usage') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version' -- "$cur")); else :;  fi ;;
        'completions') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version' -- "$cur")); else :; COMPREPLY=($(compgen -W 'bash zsh fish' -- "$cur")); fi ;;
        'man') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '--config --workspace --json --quiet --color --help --version --dir' -- "$cur")); else :; COMPREPLY=($(compgen -W 'castra.toml security' -- "$cur")); fi ;;
    esac
}
complete -F _castra castra
