"""The devices an artifact can run on: the manifest's device kind is a key of this table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmc.artifact import Manifest, Variant
from llmc.errors import ArtifactError, UsageError
from llmc.runtime.devices import cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """How a kind of device is asked for its features and prepared before TVM starts."""

    tvm_name: str
    features: Callable[[], frozenset[str]]
    withheld: Callable[[], frozenset[str]]  # what the device has and this process may not use
    prepare: Callable[[], None]


DEVICES: dict[str, Device] = {
    "cpu": Device(
        tvm_name="cpu", features=cpu.features, withheld=cpu.withheld, prepare=cpu.prepare
    ),
}


def choose_variant(manifest: Manifest, kind: str) -> Variant:
    """The first variant for `kind` whose features this machine has.

    Raises UsageError for an unknown kind and ArtifactError, with what is missing, where none fits:
    code for a missing feature would kill the process at its first instruction.
    """
    if kind not in DEVICES:
        raise UsageError(f"unknown device {kind!r}", hint=f"known: {', '.join(DEVICES)}")
    present = DEVICES[kind].features()
    missing: list[str] = []
    absent: set[str] = set()
    for variant in manifest.variants:
        if variant.device_kind != kind:
            continue
        lacking = [f for f in variant.features if f not in present]
        if not lacking:
            return variant
        missing.append(f"{variant.target} needs {', '.join(lacking)}")
        absent.update(lacking)
    refused = sorted(absent & DEVICES[kind].withheld()) if missing else []
    if refused:
        raise ArtifactError(
            f"this process may not use {', '.join(refused)}, which the artifact was built for",
            hint="the operating system refuses them: Linux before 5.16 and some sandboxes do; "
            "or compile for a lower level (llmc compile --target cpu:…)",
        )
    if missing:
        raise ArtifactError(
            f"this machine's {kind} lacks what the artifact was built for: {'; '.join(missing)}",
            hint="compile the model again on (or for) a machine like this one",
        )
    built = ", ".join(sorted({v.device_kind for v in manifest.variants}))
    raise ArtifactError(
        f"the artifact was built for {built}, not for {kind}",
        hint=f"run it with a {built} device, or compile with --target {kind}",
    )
