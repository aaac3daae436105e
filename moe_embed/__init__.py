"""moe_embed: open training of sparse mixture-of-experts text embedding models, in JAX.

The pipeline (Nomic Embed v2, arXiv 2502.07972), each stage a verb `python -m moe_embed.<verb>`:

    text -> data/ (tokenise, mix, pack) -> train -> program -> objectives -> model/ -> infonce -> update -> checkpoint
         -> evaluate, embed -> export (PyTorch, sentence-transformers)

The name is the annotation. Every array carries its logical dims as a suffix, parameters too: `x_BLD`, `w_up_EDF`.
The letters mean the same in the whole package, and they are what sharding.py maps to mesh axes:

    B  rows of a batch          H  heads                     E  experts                 C  candidate documents, gathered
    L  tokens in a row          K  head dim                  A  active experts a token  M  micro-batches
    J  key tokens               G  fused groups (q, k, v)    X  rows grouped by expert  R  repeats of the scanned unit
    T  tokens, B * L flat       F  feed-forward              S  texts in a packed row
    D  model                    V  vocabulary                N  texts (queries or documents) in a batch
    P  learned positions        Y  token types               U  model, inside the head of masked language modelling
    Z  masked places in a row

"axis" is a mesh axis, "dim" an array dimension, "num_" a count.
"""

from moe_embed.config import Config, Encoder
from moe_embed.load import load  # the function: `moe_embed.load(DIR).encode(texts)`; the module is sys.modules' alone
from moe_embed.mteb_model import mteb_model  # likewise; mteb is imported when it is called

__version__ = "0.1.0"
__all__ = ["Config", "Encoder", "load", "mteb_model"]
