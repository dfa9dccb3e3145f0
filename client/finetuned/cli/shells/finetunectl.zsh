#compdef finetunectl
# Completion of finetunectl for zsh.
_finetunectl() {
    local kind line
    local -a lines values shown
    lines=("${(@f)$(${(Q)words[1]/#\~/$HOME} _complete zsh \
        "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}")
    kind=$lines[1]
    for line in "${(@)lines[2,-1]}"; do
        values+=("${line%%$'\t'*}")
        shown+=("${line/$'\t'/  -- }")
    done
    case $kind in
        files) [[ $PREFIX == *=* ]] && compset -P '*='; _files ;;
        folders) [[ $PREFIX == *=* ]] && compset -P '*='; _files -/ ;;
        open) (( $#values )) && compadd -S '' -V finetunectl -l -d shown -a values ;;
        *) (( $#values )) && compadd -V finetunectl -l -d shown -a values ;;
    esac
}
if [[ $funcstack[1] == _finetunectl ]]; then
    _finetunectl "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
    compdef _finetunectl finetunectl
fi
