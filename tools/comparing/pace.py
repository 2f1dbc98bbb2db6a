"""What a step of each arm takes, timed in turns: by that the seconds of a budget become steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UsageError
from pipeline.staging import write_whole
from tools.children import PassOn, call
from tools.comparing.experiment import Plan
from tools.comparing.records import PACE, deciding, digest, measured
from tools.comparing.wording import listed
from train.config import as_values, completed, flat
from train.json_files import read_object


def measured_paces(plan: Plan, stop: PassOn, *, times: int = 1, quiet: bool) -> dict[str, float]:
    """arm -> seconds of a step, which its seconds are divided by, for every arm whose budget is seconds.

    All are measured in one go, in turns, so that the machine's mood cannot favour one. An arm that joins later is
    measured together with an earlier one, and gets that one's paces, past and first, times the ratio of the two.
    Seconds are divided by what was measured first; until all were measured so many `times` they are measured again, for
    the record alone.
    """
    wishes = {arm: plan.wish(arm) for arm in plan.arms}
    wishes = {arm: wish for arm, wish in wishes.items() if wish.budget.seconds is not None}
    devices = {"gpus": plan.gpus} if plan.gpus > 1 else {}
    keys = {arm: digest({**unhurried(flat(as_values(wish))), **devices}) for arm, wish in wishes.items()}
    earlier = read_object(plan.out / PACE)
    known = {arm: earlier[arm] for arm, key in keys.items() if earlier.get(arm, {}).get("digest") == key}
    if wishes and not known and (others := sorted(earlier.keys() - wishes.keys())):
        raise UsageError(
            f"{listed(list(wishes))} cannot be timed in turns with {others[0]}, which {plan.out} has: name both. What "
            "is there is not trained again."
        )
    if known.keys() < wishes.keys() or any(len(measured(each)) < times for each in known.values()):
        if not quiet:
            print(f"measuring a step of {', '.join(wishes)}, in turns", file=sys.stderr, flush=True)
        question = plan.out / f".{PACE}"
        write_whole(question, json.dumps({"settings": {arm: as_values(wish) for arm, wish in wishes.items()}}))
        call(["train.pace", str(question), str(plan.gpus)], "measuring a step of each arm", plan.out, stop)
        now = read_object(question)["seconds_per_step"]
        question.unlink()
        # Of an arm that was there before: what it took first, and at every moment until now, in what it takes now.
        first, past = 1.0, []
        if known:
            arm, each = next(iter(known.items()))
            first, past = each["seconds_per_step"] / now[arm], [then / now[arm] for then in measured(each)]
        for arm, key in keys.items():
            if arm in known:
                known[arm] = {**known[arm], "measured": [*measured(known[arm]), now[arm]]}
            else:
                known[arm] = {
                    "digest": key, "seconds_per_step": first * now[arm],
                    "measured": [*(then * now[arm] for then in past), now[arm]],
                }  # fmt: skip
        write_whole(plan.out / PACE, json.dumps({**read_object(plan.out / PACE), **known}, indent=1))
    return {arm: known[arm]["seconds_per_step"] for arm in wishes}


def unhurried(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the pace: not how long it is kept up, and no option that is at its default, as it was before there
    was it."""
    usual = completed({"objective": settings["objective"]})
    return {
        name: value for name, value in deciding(settings).items()
        if name == "objective" or (value != usual.get(name) and not name.startswith("budget."))
    }  # fmt: skip
