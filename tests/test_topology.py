"""Names of chips and groups of them."""

import pytest

from moe_embed import topology
from moe_embed.config import UserError


@pytest.mark.parametrize(
    ("name", "chip", "count", "shape"),
    [
        ("v5e-8", "v5e", 8, "v5e:2x4"),
        ("v5litepod-16", "v5e", 16, "v5e:4x4"),
        ("v5e-256", "v5e", 256, "v5e:16x16"),
        ("v6e-8", "v6e", 8, "v6e:2x4"),
        ("v5p-64", "v5p", 32, "v5p:2x4x4"),  # the suffix counts cores
        ("v4-8", "v4", 4, "v4:2x2x1"),
        ("V5E-1", "v5e", 1, "v5e:1x1"),
        ("h100-8", "h100", 8, ""),
        ("8xH100", "h100", 8, ""),
        ("a100-1", "a100", 1, ""),
        ("h200-16", "h200", 16, ""),
    ],
)
def test_names(name, chip, count, shape):
    found = topology.find(name)
    assert (found.chip.name, found.num_chips, found.slice) == (chip, count, shape)


@pytest.mark.parametrize("name", ["v5e-7", "v5p-1", "h100-12", "h100-0", "8xv99", "tpu", "", "v5e", "v5e-8-8"])
def test_other_names_are_one_sentence_with_the_known_ones(name):
    with pytest.raises(UserError, match=r"is not known; known: v5e-\{1,4,8,16,32,64,128,256\}, .*v5p-\{8,16,"):
        topology.find(name)


def test_the_next_larger():
    assert topology.bigger(topology.find("v5e-8")).name == "v5e-16"
    assert topology.bigger(topology.find("v5p-64")).num_chips == 64
    assert topology.bigger(topology.find("v5e-256")) is None
    assert topology.bigger(topology.find("h100-8")).num_chips == 16
    assert [topology.bigger(topology.find(f"{n}xH100")).num_chips for n in (1, 4, 5, 7, 24)] == [2, 8, 8, 8, 48]
    assert topology.bigger(topology.find("v5e-1")).name == "v5e-4"


def test_several_gpu_hosts_are_as_fast_as_their_network():
    one, two = topology.find("h100-8"), topology.find("h100-16")
    assert two.wires < one.wires
    assert topology.find("v5e-256").wires == topology.find("v5e-8").wires


def test_the_table_holds_what_the_makers_say():
    peaks = {chip.name: (chip.flops / 1e12, round(chip.hbm / 1e9), chip.bandwidth / 1e9) for chip in topology.CHIPS}
    assert peaks["v5e"] == (197, 17, 819)
    assert peaks["v5p"] == (459, 103, 2765)
    assert peaks["h100"] == (989, 74, 3350)  # 80 GB times GPU_SHARE
    assert all(len(set(chip.slices)) == len(chip.slices) for chip in topology.CHIPS)
