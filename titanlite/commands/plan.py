"""Predict which layout of a training run is fastest on devices that need not be there, and what it needs.

CONFIG is a TOML file, or the name of a packaged one such as llama3_8b; options of the trainer may follow.
--model=llama3:70B takes that model instead, with 8192 tokens per sequence, compiled. --device=cpu predicts the
configured layout alone, on this machine; it takes about half a minute, for which operators are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titanlite.config import JobConfig

_TOP = 10


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="titanlite plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = cli.add_argument
    add("config", nargs="?", metavar="CONFIG")
    add("--model", metavar="FAMILY:FLAVOR", help="a model in place of a file's")
    add("--device", default="h100", help="its name, by default h100; a wrong one lists all. Or a TOML file, or cpu")
    add("--devices", type=int, help="how many; default: 8, of the CPU one process")
    add("--tokens", help="to train on, such as 2T; default: those of training.steps")
    add("--price", type=float, help="of an hour of a device, for the cost")
    add("--top", type=int, help=f"layouts to show; default: {_TOP}")
    add("--fixed", action="store_true", help="predict the configured layout alone")
    add("--explain", type=int, metavar="N", help="show where the time and the memory of layout N go")
    add("--write", type=Path, metavar="FILE", help="write layout 1, or that of --explain, as a TOML file")
    add("--json", action="store_true", help="print one JSON object, not a table")
    return cli


def main(argv: list[str]) -> int:
    args, options = parser().parse_known_args(argv)
    from titanlite.config import packaged
    from titanlite.environment import CONFIG_FILE
    from titanlite.launch.command_line import read_config, report

    given = [*([f"--job.config_file={args.config}"] if args.config else []), *options]
    if args.model:
        family, _, flavor = args.model.partition(":")
        given = [
            f"--model.name={family}",
            f"--model.flavor={flavor}",
            "--training.seq_len=8192",
            "--training.compile",
            *given,
        ]
    else:
        os.environ.setdefault(CONFIG_FILE, packaged.find("debug_model") or "")
    config = read_config(given)
    from titanlite.errors import ConfigError
    from titanlite.plan import request
    from titanlite.plan.report import describe, dump, explain

    try:
        default = 1 if args.device == "cpu" else 8
        devices = default if args.devices is None else args.devices
        request.check_numbers(devices, args.top, args.price)
        if args.device == "cpu":
            return _plan_here(config, args, devices)
        plan = request.plan_for(config, args.device, devices, fixed=args.fixed, top=args.top or _TOP)
        tokens = request.tokens_of(config, plan, args.tokens)
        print(dump(plan, tokens, args.price) if args.json else describe(plan, tokens, args.price))
        number = 1 if args.explain is None else args.explain
        if args.explain is not None:
            request.chosen(plan, number)
            print(explain(plan, number), file=sys.stderr if args.json else sys.stdout)
        if args.write:
            request.write(config, request.chosen(plan, number), args.write)
            print(f"{args.write} is written", file=sys.stderr)
    except ConfigError as e:
        return report(e, config)
    return 0


def _plan_here(config: JobConfig, args: argparse.Namespace, processes: int) -> int:
    """Predict the configured layout on the CPU of this machine."""
    from titanlite.doctor.cpu_time import describe, plan_cpu
    from titanlite.errors import ConfigError
    from titanlite.plan import request

    for option in ("price", "top", "explain", "write"):
        if (value := getattr(args, option)) is not None:
            why = "a plan of this machine's CPU has one layout, the configured one, in parts; leave it out"
            raise ConfigError(why, key=f"--{option}", value=value)
    plan = plan_cpu(config, processes)
    given = args.tokens
    tokens = request.tokens_in(given) if given else float(config.training.steps * plan.tokens_per_step)
    if args.json:
        about = {"device": "cpu", "devices": plan.processes, "tokens": tokens}
        print(json.dumps({**about, "layouts": [plan.row(tokens)]}, indent=2))
    else:
        print(describe(plan, tokens))
    return 0
