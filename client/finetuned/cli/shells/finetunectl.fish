# Completion of finetunectl for fish.
function __finetunectl_complete
    set -l words (commandline -opc)
    set -l program $words[1]
    set -e words[1]
    set -l lines ($program _complete fish $words (commandline -ct | string unescape) 2>/dev/null)
    switch "$lines[1]"
        case files
            __finetunectl_paths __fish_complete_path
        case folders
            __finetunectl_paths __fish_complete_directories
        case '*'
            string join \n -- $lines[2..-1]
    end
end
# Paths, also behind the `=` of an option or a parameter.
function __finetunectl_paths
    set -l head (string replace -r '[^=]*$' '' -- (commandline -ct))
    for path in ($argv[1] (string replace -r '^.*=' '' -- (commandline -ct)))
        echo -- $head$path
    end
end
complete -c finetunectl -f -k -a '(__finetunectl_complete)'
