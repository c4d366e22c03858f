# Prints what zsh would offer: `zsh -f zsh-complete.zsh SCRIPT 'castra up --b'`, one candidate a line.
# zsh completes only at a terminal, so an interactive one is run on a pseudo-terminal, in which every
# candidate is printed as it is found.
zmodload zsh/zpty || exit 2
zpty shell zsh -f -i
() {
    zpty -w shell "source $1"
    local line
    while zpty -r shell line; do
        [[ $line == *ready* ]] && return
    done
    exit 2
} =(<<< '
PROMPT=
setopt no_beep
autoload -Uz compinit
compinit -D -u
source '${(q)1}'
bindkey "^I" complete-word
mark() { print -r -- "<mark>" }
compprefuncs=(mark)
comppostfuncs=(mark exit)
zstyle ":completion:*" insert-tab false
compadd() {
    # Calls that only fill arrays offer nothing.
    if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]]; then
        builtin compadd "$@"
        return
    fi
    local -a found
    builtin compadd -A found "$@"
    print -rl -- ${(u)found/#/offers: }
    builtin compadd "$@"
}
print ready')
zpty -w -n shell "$2"$'\t'
marks=0
while zpty -r shell line; do
    line=${line//$'\r'/}
    line=${line%$'\n'}
    case $line in
    *'<mark>'*) (( ++marks == 2 )) && break ;;
    'offers: '*) print -r -- ${line#offers: } ;;
    esac
done
zpty -d shell
exit 0
