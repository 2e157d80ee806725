#!/bin/bash
# Run on a node by `trainer submit --probe`: says what is there, NAME=VALUE a line. Changes nothing.
# Arguments: the interpreter that jobs would use, then files that exist where jobs are submitted.
python=$1
shift
say() { printf '%s=%s\n' "$1" "$2"; }
has() { command -v "$1" >/dev/null 2>&1; }

say host "$(hostname)"
say cpus "$(getconf _NPROCESSORS_ONLN)"
say memory_kilobytes "$(awk '/^MemTotal/ { print $2 }' /proc/meminfo)"
say shm_kilobytes "$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $2 }')"
say end_time "${SLURM_JOB_END_TIME:-}"
say visible_gpus "${CUDA_VISIBLE_DEVICES:-}"
if has nvidia-smi; then nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | sed 's/^/gpu=/'; fi
for runtime in apptainer singularity enroot; do if has "$runtime"; then say container "$runtime"; fi; done
# Interfaces with a route are up and have an address; 32 is InfiniBand.
for name in $(awk 'NR > 1 { print $1 }' /proc/net/route | sort -u); do
  say interface "$name $(cat "/sys/class/net/$name/type" 2>/dev/null) $(cat "/sys/class/net/$name/speed" 2>/dev/null)"
done
say default_interface "$(awk '$2 == "00000000" { print $1; exit }' /proc/net/route)"
for file in "$@"; do if [ -e "$file" ]; then say shared "$file"; fi; done
if "$python" -c 'import trainer' >/dev/null 2>&1; then say python yes; fi
exit 0
