"""What a machine without a GPU can still say of GPU code: the program that jax would hand to an H100."""

import jax


def lowered(f, *arguments) -> str:
    """The StableHLO of `f` for CUDA, as text; a Pallas kernel for Triton is a custom call `xla.gpu.triton` in it.

    jax 0.12 asks which GPU it is for. Nothing is compiled: Triton itself comes with the GPU.
    """
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
