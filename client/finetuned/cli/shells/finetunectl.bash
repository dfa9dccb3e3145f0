# Completion of finetunectl for bash.
_finetunectl() {
    local line kind IFS=$'\n'
    local -a lines
    mapfile -t lines < <("${1/#\~/$HOME}" _complete bash "${COMP_LINE:0:COMP_POINT}" \
        "$COMP_WORDBREAKS" "$COMP_TYPE" 2>/dev/null)
    kind=${lines[0]}
    COMPREPLY=("${lines[@]:1}")
    case $kind in
        files) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$2") ;;
        folders) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -d -- "$2") ;;
        open) compopt -o nospace 2>/dev/null ;;
    esac
}
complete -o nosort -F _finetunectl finetunectl
