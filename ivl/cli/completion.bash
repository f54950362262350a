_ivl() {
    local current="${COMP_WORDS[COMP_CWORD]}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="@commands@ --help --version"
    elif [[ "$current" == -* ]]; then
        case "${COMP_WORDS[1]} ${COMP_WORDS[2]}" in
@options@
        esac
    elif [ "$COMP_CWORD" -eq 2 ]; then
        case "${COMP_WORDS[1]}" in
@seconds@
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o bashdefault -o default -F _ivl ivl
