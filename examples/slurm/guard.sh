# shellcheck shell=bash
# What the scripts make of numbers, names, keys and other runs that come from outside. Sourced; needs `die`.

# whole NAME VALUE: the number, without leading zeros. Bash's arithmetic would run `a[$(…)]`.
whole() {
    [[ $2 =~ ^[0-9]{1,15}$ ]] || die "$1: expected a whole number, got '$2'"
    echo "$((10#$2))"
}

# number_in FILE: the number that a file holds; nothing, and status 1, where it holds none.
number_in() {
    local text=
    [ -f "$1" ] && read -r text 2>/dev/null <"$1"
    [[ $text =~ ^[0-9]{1,15}$ ]] && echo "$((10#$text))"
}

# plain_name TEXT: as the name of one directory.
plain_name() {
    local name=${1//[^A-Za-z0-9._-]/_}
    [[ $name != .* ]] || name=_$name
    echo "${name:0:100}"
}

# anchor NAME…: the relative paths in these variables become those of the directory that the command was given in. A
# program's name without a slash is looked for on PATH.
anchor() {
    local name
    for name; do
        [ -z "${!name:-}" ] || [[ ${!name} == /* || ($name == PYTHON && ${!name} != */*) ]] ||
            printf -v "$name" '%s' "$(realpath -ms "${!name}")"
    done
}

# mounts PATH…: A:A,B:B for --container-mounts, of those that exist here. A weight before a path is left out; of a link
# its end is mounted too, of a model in the hub's cache the folder that its links lead into.
mounts() {
    local path place found=,
    for path; do
        [[ $path != *:/* ]] || path=/${path#*:/}
        [ -n "$path" ] && [ -e "$path" ] || continue
        for place in "$(realpath -s "$path")" "$(realpath "$path")"; do
            place=${place%/snapshots/*}
            [[ $place != *[,:]* ]] || die "$place: cannot be mounted: its name has a comma or a colon"
            [[ $found == *",$place:$place,"* ]] || found+=$place:$place,
        done
    done
    found=${found#,}
    echo "${found%,}"
}

# hide WORD…: fills `shown` with the words of a command as a shell takes them. A key, a password, a URL with
# one: each is replaced by a variable, exported here, so that it is written nowhere and the command still runs.
declare -a shown
hide() {
    local names='^(-*.*[-_.])?-*(key|api[-_]?key|apikey|token|pat|secret|password|passwd|passphrase|pass|pwd|credentials?|auth|authorization|bearer|jwt|cookie|dsn)$'
    local shapes='://[^/@[:space:]]+@|(^|[^A-Za-z0-9])(hf_|sk-|gh[opsur]_|github_pat_|glpat-|xox[a-z]-|AKIA|wandb_v1_|nvapi-|eyJ)[A-Za-z0-9_.-]{8,}|-----BEGIN|[?&][^=&]*(key|token|secret|sig|password|credential)[^=&]*='
    local flag='^--[a-z][a-z0-9_-]*(=|$)' word next=0 number=0 name
    shown=()
    for word; do
        if ((next)) && ! [[ $word =~ $flag ]]; then
            number=$((number + 1)) && export "MEGATRON_DFT_KEY_$number=$word"
            shown+=("\"\$MEGATRON_DFT_KEY_$number\"")
            continue
        fi
        next=0 name=${word%%=*}
        if [[ $word == ?*=?* && ${name,,} =~ $names ]]; then
            number=$((number + 1)) && export "MEGATRON_DFT_KEY_$number=${word#*=}"
            shown+=("$(printf %q "$name")=\"\$MEGATRON_DFT_KEY_$number\"")
        elif [[ $word =~ $shapes ]]; then
            number=$((number + 1)) && export "MEGATRON_DFT_KEY_$number=$word"
            shown+=("\"\$MEGATRON_DFT_KEY_$number\"")
        else
            [[ $word == --* && $word != *=* && ${name,,} =~ $names ]] && next=1
            shown+=("$(printf %q "$word")")
        fi
    done
}

# from_here WORD…: fills `anchored` with the words of a training command; its relative paths become those of the
# directory that it was given in. What a run reads is a path where it is there, else a name of the hub.
declare -a anchored
from_here() {
    local flag='' word before path
    anchored=()
    for word; do
        before='' path=$word
        if [[ $word == --* ]]; then
            flag=${word%%=*}
            if [[ $word != *=* ]]; then
                anchored+=("$word")
                continue
            fi
            before=$flag= path=${word#*=}
        fi
        case $flag in
            --train-data | --valid-data)
                # Shares, cap= and epochs= stand before a colon.
                if [[ ! -e $path && $path =~ ^([^/:]+:)(.+)$ ]]; then
                    before+=${BASH_REMATCH[1]} path=${BASH_REMATCH[2]}
                fi
                [[ $path != /* && -e $path ]] && path=$PWD/$path
                ;;
            --hf-model | --dft-reference-model | --dft-reference-scores | --chat-template)
                [[ $path != /* && -e $path ]] && path=$PWD/$path
                ;;
            --save | --load | --save-hf | --data-cache | --tensorboard-dir | --stop-file)
                [[ $path == /* ]] || path=$PWD/$path
                ;;
        esac
        anchored+=("$before$path")
    done
}

# The environment that is kept beside a leg: these names and no others.
recorded=(
    SLURM_JOB_ID SLURM_JOB_NAME SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_COUNT SLURM_NNODES
    SLURM_JOB_NODELIST SLURM_JOB_PARTITION SLURM_RESTART_COUNT SLURM_GPUS_ON_NODE SLURM_CPUS_ON_NODE
    SLURM_NTASKS SLURM_CLUSTER_NAME SLURM_SUBMIT_DIR HOSTNAME PATH LD_LIBRARY_PATH PYTHONPATH TMPDIR LANG
    CUDA_HOME CUDA_VISIBLE_DEVICES CUDA_DEVICE_MAX_CONNECTIONS CUDA_MODULE_LOADING PYTORCH_CUDA_ALLOC_CONF
    PYTORCH_ALLOC_CONF TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_NCCL_TRACE_BUFFER_SIZE
    TORCH_NCCL_ASYNC_ERROR_HANDLING TORCHDYNAMO_DISABLE NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_HCA
    NCCL_IB_DISABLE NCCL_IB_GID_INDEX NCCL_IB_TC NCCL_IB_SL NCCL_IB_TIMEOUT NCCL_NET NCCL_NET_PLUGIN
    NCCL_NET_GDR_LEVEL NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_SHM_DISABLE NCCL_ALGO NCCL_PROTO NCCL_CROSS_NIC
    NCCL_NVLS_ENABLE NCCL_TOPO_FILE NCCL_TUNER_PLUGIN GLOO_SOCKET_IFNAME UCX_NET_DEVICES OMP_NUM_THREADS
    MKL_NUM_THREADS PYTHONUNBUFFERED TOKENIZERS_PARALLELISM WANDB_MODE WANDB_PROJECT HF_HOME HF_HUB_OFFLINE
    HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE RUN_DIR MEGATRON_DFT_HOME MEGATRON_DFT_DATA_CACHE
)
# record FILE: writes them, for the owner alone to read.
record() (
    umask 077
    rm -f "$1"
    for name in "${recorded[@]}"; do
        [ -z "${!name+x}" ] || printf '%s=%q\n' "$name" "${!name}"
    done >"$1"
)

# When a living process began, by the kernel's count; nothing where there is none.
born() { awk '{ sub(/^.*\) /, ""); if ($1 != "Z" && $1 != "X") print $20 }' "/proc/$1/stat" 2>/dev/null; }

# own DIR: this script writes there and no other; ends the script where another one does. The owner's file says
# job, host, process and its beginning. A dead owner is replaced: Slurm knows which jobs live, the kernel which
# processes of this machine do. Made by a hard link, which NFS keeps to.
own() {
    local directory=$1 file=$1/.owner entry found draft job host pid start more state
    entry="${SLURM_JOB_ID:-0} ${HOSTNAME:-unknown} $$ $(born $$)"
    while :; do
        draft=$(mktemp "$directory/.owner.XXXXXXXX") || die "$directory cannot be written"
        echo "$entry" >"$draft"
        if ln -T "$draft" "$file" 2>/dev/null; then
            rm -f "$draft"
            owned=$file owned_entry=$entry
            trap disown_run_dir EXIT
            return
        fi
        rm -f "$draft"
        [ -L "$file" ] && die "$file is a link; look at it, delete it"
        [ -e "$file" ] || die "$file cannot be made: the file system has no hard links; RUN_DIR has to be elsewhere"
        found=$(cat "$file" 2>/dev/null) || continue
        read -r job host pid start more <<<"$found"
        [[ $job =~ ^[0-9]+$ && $pid =~ ^[0-9]+$ && -z $more ]] ||
            die "$file: expected job, host and process, got '${found:0:80}'; look at it, delete it"
        state=$(alive "$job" "$host" "$pid" "$start")
        [ -z "$state" ] ||
            die "RUN_DIR $directory is being written by process $pid on $host, job $job ($state);" \
                "end it, or choose another RUN_DIR. Where it is certain that it has ended: rm $file"
        # Another one may have found it dead too: only what was judged goes.
        draft=$(mktemp -u "$directory/.owner.XXXXXXXX")
        mv -T "$file" "$draft" 2>/dev/null || continue
        [ "$(cat "$draft")" = "$found" ] || ln -T "$draft" "$file" 2>/dev/null || true
        rm -f "$draft"
    done
}

# alive JOB HOST PID START: what says that this owner lives; nothing where it is dead.
alive() {
    local said living='PENDING|RUNNING|COMPLETING|CONFIGURING|SUSPENDED|STOPPED|REQUEUE|RESIZING|SIGNALING|STAGE_OUT'
    if [ "$1" != 0 ] && [ "$1" = "${SLURM_JOB_ID:-0}" ]; then
        : # an earlier leg of this very job
    elif [ "$1" != 0 ]; then
        if said=$(squeue --noheader --jobs "$1" --format %T 2>&1); then
            # It may remember a job for a while after its end.
            [[ ! $said =~ $living ]] || echo "${said//$'\n'/ }"
        elif [[ $said != *"Invalid job id"* ]]; then
            echo "Slurm does not answer here"
        fi
    elif [ "$2" != "${HOSTNAME:-unknown}" ]; then
        echo "on another machine, which cannot be asked"
    elif [ -n "$4" ] && [ "$(born "$3")" = "$4" ]; then
        echo "running"
    fi
}

# shellcheck disable=SC2317,SC2329 # called by the trap
disown_run_dir() { [ "$(cat "$owned" 2>/dev/null)" != "$owned_entry" ] || rm -f "$owned"; }
