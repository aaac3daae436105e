"""Do embeddings depend on the number of devices? Run by tests.bench.cpu in a process of its own, with virtual devices.

python -m tests.bench.devices FOLDER TEXTS.json        prints one line of JSON, the last of its output
"""

import json
import os
import pathlib
import sys
from collections.abc import Sequence

COUNTS = (1, 2, 4, 8)


def differences(folder: str, texts: Sequence[str], counts: Sequence[int] = COUNTS) -> dict[str, dict]:
    """For the same packed rows, and for `encode`, which packs for the devices it has: each count against the first.

    Largest difference of a number of a unit vector, and the share of the texts whose vectors are the same bit for bit.
    """
    import jax
    import numpy as np

    from moe_embed import config, program, sharding
    from moe_embed.data import packing
    from moe_embed.load import TEXTS_PER_ROW, load

    found: dict[str, dict[int, np.ndarray]] = {"the same rows": {}, "encode": {}}
    for count in counts:
        mesh = sharding.make_mesh(config.Mesh(), devices=jax.devices()[:count])
        model = load(folder, mesh=mesh)
        ids = model.tokenizer.encode(texts, max_length=model.encoder.max_seq_length)[0]
        longest = max(map(len, ids))
        packed = packing.pack([len(text) for text in ids], row_length=longest, texts_per_row=TEXTS_PER_ROW)
        num_rows = -(-packed.num_rows // max(counts)) * max(counts)
        rows = packing.fill_rows(ids, packed, num_rows=num_rows, row_length=longest)
        rows = {name.replace("_BL", "_MBL"): array[None] for name, array in rows.items()}
        embed = program.build_embed(model.encoder, model.moe, mesh, num_segments=TEXTS_PER_ROW)
        pooled_MBSD, _ = embed(program.lay_out(model.params, mesh), sharding.put_batch(rows, mesh=mesh))
        vectors = np.asarray(pooled_MBSD)[0, packed.row_N, packed.segment_N]
        found["the same rows"][count] = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
        found["encode"][count] = model.encode(texts)
    return {
        how: {
            str(count): {"difference": float(np.abs(vectors - of[counts[0]]).max()),
                         "identical": float((vectors == of[counts[0]]).all(1).mean())}
            for count, vectors in of.items()
        }
        for how, of in found.items()
    }  # fmt: skip


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["NPROC"] = "32"  # a device that waits in a collective holds a thread
    import jax

    jax.config.update("jax_num_cpu_devices", max(COUNTS))
    print(json.dumps(differences(sys.argv[1], json.loads(pathlib.Path(sys.argv[2]).read_text("utf-8")))))
