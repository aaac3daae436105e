# shellcheck shell=bash
# Sourced after venv.sh: `ready_gpus` makes `$python` one whose jax drives all NVIDIA GPUs of this host, or exits 2 with a sentence.
# CLUSTER_PYTHON=P uses P as it is (a container's, say); else .venv, with jax's extra for the CUDA that the driver can run.

cuda_extra() { # docs.jax.dev/en/latest/installation.html: CUDA 13 takes a driver from 580 and compute capability 7.5 on, CUDA 12 from 525
    local found driver oldest
    found=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>&1) || {
        echo "error: nvidia-smi finds no GPU here (${found%%$'\n'*}); run this on a machine with one." >&2
        return 2
    }
    driver=${found%%.*}
    oldest=$(awk -F', *' '{print $2 * 10}' <<< "$found" | sort -n | head -n 1)
    if ! [[ $driver =~ ^[0-9]+$ && $oldest =~ ^[0-9]+$ ]]; then
        echo "error: nvidia-smi says '${found%%$'\n'*}' where a driver's version and a compute capability belong." >&2
        return 2
    elif [ "$driver" -lt 525 ]; then
        echo "error: the NVIDIA driver here is ${found%%,*}; jax needs 525 or newer." >&2
        return 2
    elif [ "$driver" -ge 580 ] && [ "$oldest" -ge 75 ]; then
        echo cuda13
    else
        echo cuda12
    fi
}

ready_gpus() {
    local extra there seen
    extra=$(cuda_extra) || exit 2
    if [ -z "${CLUSTER_PYTHON:-}" ]; then ready_venv "$extra"; fi
    python=${CLUSTER_PYTHON:-python}
    # Named, a platform that cannot be had is an error; jax would else go on with the CPU. The CPU is for what the host computes.
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        there=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .)
    else
        there=$(nvidia-smi -L | grep -c '^GPU ')
    fi
    seen=$("$python" -c 'import jax; print(jax.local_device_count())') || exit 2
    if [ "$seen" != "$there" ]; then
        echo "error: of $there GPUs here jax sees $seen; \"$python -m moe_embed.doctor\" says more." >&2
        exit 2
    fi
    # NVIDIA's own jax images set this one and no other (docs.nvidia.com/jax-toolbox/environment-variables); one GPU sends nothing.
    if [ "$there" -gt 1 ] && [[ ${XLA_FLAGS:-} != *latency_hiding_scheduler* ]]; then
        export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
    fi
    # Left to itself jax takes three quarters of a GPU's memory (jaxlib/xla_client.py); `plan` counts on this (topology.GPU_SHARE).
    if [ -z "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.92}; fi
    echo "$there GPUs, $extra."
}
