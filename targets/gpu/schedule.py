"""Schedules for what no kernel rule took: TVM's dlight, for every GPU target."""

from __future__ import annotations

import tvm
from tvm.s_tir import dlight

from llmc.targets.base import ScheduleRule

# Products are ours: dlight would sum float16 products in float16.
_RULES = {
    "dlight.reduction": dlight.gpu.Reduction,
    "dlight.general_reduction": dlight.gpu.GeneralReduction,
    "dlight.fallback": dlight.gpu.Fallback,
}


def schedule_rules(target: tvm.target.Target) -> list[tuple[str, ScheduleRule]]:
    """dlight's rules for `target`, the last of which takes everything."""

    def bound(rule: object) -> ScheduleRule:
        def schedule(func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc | None:
            found = rule.apply(func, target, False)  # type: ignore[attr-defined]
            if found is None:
                return None
            first = found[0] if isinstance(found, list) else found
            return first.mod["main"].with_attr("tirx.is_scheduled", True)

        return schedule

    return [(name, bound(rule())) for name, rule in _RULES.items()]
