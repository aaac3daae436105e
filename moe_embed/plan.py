"""What a training step will need on hardware that is not here: does it fit, what does it send, how long should it take?

    python -m moe_embed.plan --config=configs/nomic_v2/pretrain.py:paper --topology=v5e-8 --output=plan.json
    python -m moe_embed.plan --config=configs/nomic_v2/pretrain.py:paper --topology=v5p-64 --config.data.rows=16
    python -m moe_embed.plan --config=configs/nomic_v2/pretrain.py:paper --topology=8xH100

For a TPU slice the real step is compiled ahead of time by libtpu (pip install -e .[tpu]), which takes minutes, and counted in
what XLA made of it. GPU hosts are planned by arithmetic alone. The data is not read: --tokens_per_pair says how long its pairs
are. All figures are of one device and one optimiser step, and estimates: nothing is run, and no speed is measured.
"""

import importlib.metadata
import json
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import jax

from moe_embed import ahead, bars, estimate, program, sharding, verb
from moe_embed import config as config_lib
from moe_embed import topology as topology_lib
from moe_embed.config import Config, UserError
from moe_embed.estimate import Step
from moe_embed.topology import Topology

GIB = 2**30
STAYS = 0.1  # of what is not explained. Measured on v5e-8 with 32, 16 and 8 rows of 512: 17.4, 9.5 and 5.6 GiB
UNREAD = "--config.data.sources=unread"  # a preset of a recipe leaves its sources open, and here none are read


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("plan", __doc__, overrides=True)
    parser.add_argument("--config", required=True, help="a config file, as in configs/nomic_v2/pretrain.py:paper")
    parser.add_argument(
        "--topology", required=True, help=f"one of {', '.join(map(topology_lib.known, topology_lib.CHIPS))}"
    )
    parser.add_argument("--tokens_per_pair", type=float,
                        help=f"tokens of a pair, all its texts (default: {estimate.TEXT_TOKENS} a text, within the caps)")  # fmt: skip
    parser.add_argument("--output", type=pathlib.Path, help="the plan as JSON; a picture is written beside it as .svg")
    arguments, overrides = parser.parse_known_args(argv)
    config = config_lib.load(arguments.config, [*overrides, UNREAD])
    topology = topology_lib.find(arguments.topology)
    if arguments.tokens_per_pair is not None and not 0 < arguments.tokens_per_pair < math.inf:
        raise UserError(f"--tokens_per_pair={arguments.tokens_per_pair} must be a positive number.")
    if arguments.output is not None:
        verb.check_output(arguments.output, "--output")
        if arguments.output.suffix == ".svg":
            raise UserError(
                f"--output={arguments.output} is for JSON; name a .json file: the picture goes beside it as .svg."
            )
    jax.config.update("jax_platforms", "cpu")  # nothing runs here, not even where there is an accelerator
    made = plan(config, topology, tokens_a_pair=arguments.tokens_per_pair)
    name = " ".join([arguments.config, *overrides])
    print("\n".join(lines(made, title=f"{name} on {arguments.topology}")))
    if arguments.output is not None:
        picture = arguments.output.with_suffix(".svg")
        title = f"{name} on {arguments.topology}: {made['verdict']}"
        picture.write_text(bars.as_svg(made["hbm"]["bars"], limit=made["hbm"]["limit"], title=title), "utf-8")
        arguments.output.write_text(json.dumps({"config": name} | made, indent=1) + "\n", "utf-8")
        print(f"wrote {arguments.output} and {picture}")


def plan(config: Config, topology: Topology, *, tokens_a_pair: float | None = None) -> dict:
    """All that is known beforehand of a step of `config` on `topology`, as plain JSON. UserError where it cannot be."""
    mesh = sharding.imagine_mesh(config.mesh, num_devices=topology.num_chips)
    prog = program.build(config, mesh)
    config = prog.config  # with loss.form decided
    tokens_a_pair = estimate.tokens_per_pair(config) if tokens_a_pair is None else tokens_a_pair
    step = estimate.step_of(config, num_devices=topology.num_chips, tokens_a_pair=tokens_a_pair)
    of_state = {"abstract_state": prog.abstract_state, "mesh": mesh}
    parts = estimate.memory(config, step, **of_state)
    notes, compiled = [], None
    if topology.slice:
        real = sharding.make_mesh(config.mesh, devices=ahead.devices(topology))
        print(f"compiling the train step for {topology.num_chips} x {topology.chip.name} ...", flush=True)
        compiled = ahead.compile_step(program.build(config, real), step)
    else:
        notes.append(f"nothing is compiled for {topology.chip.name}: memory, FLOPs and bytes sent are arithmetic.")
    hbm = memory_of(compiled, parts, limit=topology.chip.hbm)
    count = compiled.count if isinstance(compiled, ahead.Compiled) else None
    notes += notes_of(compiled)
    model = sum(estimate.model_flops(config, step).values())
    sent = count.bytes_by_kind() if count else estimate.wires(config, step, **of_state)
    seconds = estimate.seconds(
        topology, model=model, computed=count.flops if count else model * (4 / 3 if config.run.recompute else 1),
        moved=estimate.traffic(config, step, **of_state), sent=sum(sent.values()),
    )  # fmt: skip
    fits = hbm["peak"] <= hbm["limit"] and not isinstance(compiled, ahead.Refused)
    total, active = program.count_parameters(prog.abstract_state["params"], config)
    hours = {end: seconds[end] * config.run.steps / 3600 for end in ("low", "high")}
    return {
        "topology": {"name": topology.name, "slice": topology.slice, "chips": topology.num_chips, "chip": chip_row(topology)},
        "mesh": dict(mesh.shape),
        "step": {
            "objective": config.loss.objective, "form": config.loss.form, "items": config.data.batch_size,
            "tokens_per_pair": tokens_a_pair, "items_per_device": step.items, "tokens": step.tokens,
            "places": step.places, "micro_batches": step.num_micro, "rows": config.data.rows,
            "row_length": config.data.row_length, "recompute": config.run.recompute, "dtype": config.encoder.dtype,
        },
        "parameters": {"total": total, "active": active},
        "flops": {
            "model": model, "compiled": count.flops if count else None, "ratio": count.flops / model if count else None,
            "by_part": estimate.model_flops(config, step),
        },
        "custom_calls": custom_calls(count),
        "hbm": hbm,
        "collectives": {"total": sum(sent.values()), **sent},
        "collectives_source": "compiled" if count else "arithmetic",
        "step_seconds": seconds,
        "recipe": {"steps": config.run.steps, "hours": hours,
                   "chip_hours": {end: value * topology.num_chips for end, value in hours.items()}},
        "crossovers": crossovers(config, step),
        "fits": fits,
        "verdict": verdict(hbm, fits, "" if fits else remedy(config, step, topology, hbm)),
        "compile_seconds": compiled.seconds if compiled else None,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "libtpu")},
        "notes": notes,
    }  # fmt: skip


def memory_of(compiled: ahead.Compiled | ahead.Refused | None, parts: Mapping[str, float], *, limit: float) -> dict:
    """Peak, limit and bars. Of a compiled step the peak is XLA's; what arithmetic does not explain of it counts as activations."""
    if compiled is None:
        return {"peak": sum(parts.values()), "limit": limit, "source": "arithmetic", "bars": dict(parts)}
    refused = isinstance(compiled, ahead.Refused)
    peak = compiled.needed if refused else compiled.peak
    rest = peak - sum(size for name, size in parts.items() if name != "activations")
    found = {"peak": peak, "limit": min(limit, compiled.available) if refused else limit}
    found |= {
        "source": "refused by XLA" if refused else "compiled",
        "bars": dict(parts) | {"activations": max(rest, 0.0)},
    }
    if not refused:
        found["xla"] = {name: getattr(compiled, name) for name in ("arguments", "temporaries", "outputs", "aliased")}
    return found


def notes_of(compiled: ahead.Compiled | ahead.Refused | None) -> list[str]:
    """Sentences about what could not be counted, or was counted by the caller."""
    if isinstance(compiled, ahead.Refused):
        return ["XLA refuses the step for want of memory: FLOPs and collectives of it are arithmetic."]
    if compiled is None or compiled.count is None:
        return [compiled.note] if compiled else []
    notes = [f"NOT COUNTED: the custom call {work.what} ({work.op_name}), {work.times:,.0f} times a step"
             for work in compiled.count.unknown]  # fmt: skip
    if any(loop.source == "caller" for loop in compiled.count.loops):
        notes.append(
            "loops over the tiles of experts count as if devices shared the choices evenly: the routing decides."
        )
    return notes


def custom_calls(count) -> dict[str, dict]:
    """Kernels by name: how often a step calls them, and their FLOPs in all, by arithmetic; None where nobody knows."""
    found: dict[str, dict] = {}
    for work in (*count.kernels, *count.unknown) if count else ():
        entry = found.setdefault(work.what, {"calls": 0.0, "flops": 0.0})
        entry["calls"] += work.times
        entry["flops"] = None if work in count.unknown else entry["flops"] + work.flops * work.times
    return found


def crossovers(config: Config, step: Step) -> dict:
    """Where the other way of doing it begins to pay: experts split over devices, the loss as a ring."""
    found: dict = {"expert_parallel": estimate.expert_crossover(config, step)}
    if config.loss.objective != "mlm":
        found["loss"] = estimate.loss_forms(config, step)
        found["loss"]["ring_from_pairs"] = estimate.ring_from(config, step)
    return found


def remedy(config: Config, step: Step, topology: Topology, hbm: dict) -> str:
    """The first change that should make the step fit: recompute, the ring, fewer rows in a micro-batch.

    Where none of these would: more chips, of which it is said that nothing was computed.
    """
    kept, must_go = hbm["bars"]["activations"], hbm["peak"] - 0.97 * hbm["limit"]
    moving = (1 - STAYS) * kept  # in proportion to the tokens that are kept
    if not config.run.recompute and moving * (1 - 1 / step.num_micro) >= must_go:
        return "--config.run.recompute=true"
    if config.loss.objective != "mlm" and estimate.loss_form(config, step) == "gathered" and not config.loss.distill:
        forms = estimate.loss_forms(config, step)
        if forms["gathered"]["bytes"] - forms["ring"]["bytes"] >= must_go:
            return "--config.loss.form=ring"
    rows = config.data.rows
    while config.run.recompute and rows % 2 == 0:
        rows //= 2
        if moving * (1 - rows / config.data.rows) >= must_go:
            return f"--config.data.rows={rows}, {-(-step.places // (rows * config.data.row_length))} micro-batches"
    larger = topology_lib.bigger(topology)
    return (
        f"--topology={larger.name} (not computed)"
        if larger
        else "a smaller model: no larger slice of these chips is known"
    )


def verdict(hbm: dict, fits: bool, instead: str) -> str:
    """ "fits: 10.3 of 15.8 GiB", or "does not fit: 17.9 of 15.8 GiB; try --config.data.rows=16"."""
    sizes = f"{hbm['peak'] / GIB:.1f} of {hbm['limit'] / GIB:.1f} GiB"
    return f"fits: {sizes}" if fits else f"does not fit: {sizes}; try {instead}"


def chip_row(topology: Topology) -> dict[str, float]:
    """The peaks that the plan assumes of a chip."""
    chip = topology.chip
    return {"flops": chip.flops, "hbm": chip.hbm, "bandwidth": chip.bandwidth, "wires": topology.wires}


def version(package: str) -> str | None:
    """Of an installed package; None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def lines(made: dict, *, title: str) -> list[str]:
    """A plan for a person, at most 100 columns wide."""
    step, flops, seconds, recipe, sent = (
        made[key] for key in ("step", "flops", "step_seconds", "recipe", "collectives")
    )
    chip, mesh = made["topology"]["chip"], " x ".join(f"{axis}={size}" for axis, size in made["mesh"].items())
    mlm = step["objective"] == "mlm"
    what = (
        f"{step['items']:,} rows"
        if mlm
        else f"{step['items']:,} pairs of {step['tokens_per_pair']:,.0f} tokens (--tokens_per_pair)"
    )
    out = [
        *textwrap.wrap(f"plan         {title}", 100, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False),
        f"mesh         {mesh}, {step['dtype']}; a chip: {chip['flops'] / 1e12:,.0f} TFLOP/s, {chip['bandwidth'] / 1e9:,.0f} GB/s "
        f"HBM, {chip['wires'] / 1e9:,.0f} GB/s wires",
        f"step         {what}",
        f"  a device   {step['items_per_device']:,} {'rows' if mlm else 'pairs'}, {step['tokens']:,.0f} tokens in "
        f"{step['micro_batches']} micro-batches of {step['rows']} x {step['row_length']}",
        f"parameters   {made['parameters']['total']:,}, of which a token uses {made['parameters']['active']:,}",
        f"memory       of a device, {made['hbm']['source']}",
        *bars.as_text(made["hbm"]["bars"], limit=made["hbm"]["limit"]),
        f"FLOPs        of a device: model {flops['model']:.3e}" + (
            f", compiled {flops['compiled']:.3e}, {flops['ratio']:.2f} of it" if flops["compiled"] else ", nothing compiled"),
    ]  # fmt: skip
    if step["recompute"]:
        out[-1] += " (encoding twice: 1.33)"
    for name, call in made["custom_calls"].items():
        counted = "NOT COUNTED" if call["flops"] is None else f"{call['flops']:.3e}, by arithmetic"
        out.append(f"  {name:<38}{call['calls']:>8,.0f} calls  {counted}")
    out.append(f"sent         by a device, {made['collectives_source']}: {sent['total'] / 1e9:,.2f} GB a step")
    out += [f"  {kind:<20}{size / 1e9:8.2f} GB" for kind, size in sent.items() if kind != "total" and size]
    mfu = {end: flops["model"] / (seconds[end] * chip["flops"]) for end in ("low", "high")}
    roofs = ", ".join(f"{name.removeprefix('roof_')} {value:.3g}" for name, value in seconds.items() if "roof" in name)
    out += [
        f"time         {seconds['low']:.3g} to {seconds['high']:.3g} s a step: {mfu['low']:.0%} to {mfu['high']:.0%} of the peak in model FLOPs",
        f"             (taken to be {estimate.MFU[1]:.0%} to {estimate.MFU[0]:.0%}, less where a roof is lower)",
        f"  roofs      {roofs} s",
        f"  recipe     {recipe['steps']:,} steps: {recipe['hours']['low']:,.1f} to {recipe['hours']['high']:,.1f} hours, "
        f"{recipe['chip_hours']['low']:,.0f} to {recipe['chip_hours']['high']:,.0f} chip-hours",
        *crossover_lines(made["crossovers"]),
        *(f"note         {note}" for note in made["notes"]),
        f"verdict      {made['verdict']}",
        "An estimate of a compiler and of arithmetic: nothing was run, and no speed was measured.",
    ]  # fmt: skip
    return out


def crossover_lines(found: dict) -> list[str]:
    """What splitting experts and what the ring would change."""
    out, experts = [], found["expert_parallel"]
    if experts:
        pays = "pays" if experts["tokens_per_device"] < experts["pays_below_tokens_per_device"] else "loses"
        out += [
            f"experts      split over {experts['parts']}: saves {experts['gradient_bytes_saved'] / 1e9:,.2f} GB of gradients, sends "
            f"{experts['token_bytes'] / 1e9:,.2f} GB of tokens: {pays}",
            f"             (pays below {experts['pays_below_tokens_per_device']:,.0f} tokens a device and step; here "
            f"{experts['tokens_per_device']:,})",
        ]
    if "loss" in found:
        gathered, ring = found["loss"]["gathered"], found["loss"]["ring"]
        out += [
            f"loss         gathered {gathered['bytes'] / GIB:,.3f} GiB, {gathered['flops']:.2e} FLOPs; ring "
            f"{ring['bytes'] / GIB:,.3f} GiB, {ring['flops']:.2e}",
            f"             (from {found['loss']['ring_from_pairs']:,} pairs on config.loss.form=auto is the ring)",
        ]
    return out


if __name__ == "__main__":
    verb.run(main)
