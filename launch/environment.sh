# shellcheck shell=bash
# What jax and XLA are told on each platform, and why; the launchers source it.
#
#   . launch/environment.sh cpu | gpu | tpu
#
# What is set already stays. Flags of XLA that it does not know end a run at its
# start, so that an upgrade of jax cannot make one go unnoticed.

# A run that starts again, or another host of it, compiles nothing anew. The
# programs of a pod take minutes to compile, so that every restart would.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/mlcd_jax/jax}"
# Below a second, reading the file is no gain over compiling.
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-1}"

case "${1:?error: launch/environment.sh needs cpu, gpu or tpu}" in
  cpu) ;; # XLA's defaults.
  gpu)
    # Gathers of weights (mesh.fsdp) and sums of gradients run beside the
    # products; without it the products wait for them.
    export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
    # jax takes 75 % of the memory by default. The rest is left to NCCL and
    # cuBLAS, which need a few hundred MB, not 20 GB.
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
    ;;
  tpu)
    # libtpu hides collectives by itself. Its flags are in LIBTPU_INIT_ARGS;
    # none is set here, since none was measured.
    ;;
  *)
    echo "error: launch/environment.sh $1: use cpu, gpu or tpu" >&2
    exit 2
    ;;
esac
