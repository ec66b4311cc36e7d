"""The devices an artifact can run on: the manifest's device kind is a key of this table."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmc.artifact import Manifest, Variant
from llmc.errors import ArtifactError, UsageError
from llmc.runtime.devices.cpu import Cpu
from llmc.runtime.devices.cuda import Cuda
from llmc.runtime.devices.device import Device
from llmc.runtime.devices.metal import Metal
from llmc.runtime.devices.rocm import Rocm
from llmc.runtime.devices.vulkan import Vulkan

DEVICES: dict[str, Device] = {
    "cpu": Cpu(),
    "cuda": Cuda(),
    "metal": Metal(),
    "rocm": Rocm(),
    "vulkan": Vulkan(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A device of this machine and the variant of an artifact that runs on it."""

    kind: str
    index: int
    variant: Variant

    @property
    def device(self) -> Device:
        """The kind's entry."""
        return DEVICES[self.kind]


def choose_place(manifest: Manifest, name: str | None) -> Place:
    """The device that `KIND` or `KIND:INDEX` names, prepared, and what to run on it.

    Without a name: the kind that the artifact was compiled for first. Raises UsageError for an
    unknown device, ArtifactError where the artifact has nothing for it.
    """
    kind, _, number = (name or _own_kind(manifest)).partition(":")
    if kind not in DEVICES:
        raise UsageError(f"unknown device {kind!r}", hint=f"known: {', '.join(DEVICES)}")
    if ":" in (name or "") and not re.fullmatch("[0-9]{1,3}", number):
        raise UsageError(f"device {name!r}: {number!r} is no number", hint=f"for example {kind}:0")
    if not any(v.device_kind == kind for v in manifest.variants):
        built = ", ".join(sorted({v.device_kind for v in manifest.variants}))
        raise ArtifactError(
            f"the artifact was built for {built}, not for {kind}",
            hint=f"run it with a {built} device, or compile with --target {kind}",
        )
    device = DEVICES[kind]
    index = int(number) if number else device.default_index()
    device.prepare(index)
    variant = _choose_variant(manifest, kind, device.features(index), device.withheld(index))
    return Place(kind=kind, index=index, variant=variant)


def _own_kind(manifest: Manifest) -> str:
    """The first kind of the artifact's that exists here; ArtifactError where none does."""
    built = [variant.device_kind for variant in manifest.variants]
    known = next((kind for kind in built if kind in DEVICES), None)
    if known is None:
        raise ArtifactError(
            f"the artifact was built for {', '.join(built)}, not for {', '.join(DEVICES)}",
            hint="a newer version of llmc may know the device",
        )
    return known


def _choose_variant(
    manifest: Manifest, kind: str, present: frozenset[str], withheld: frozenset[str]
) -> Variant:
    """The first variant for `kind` that needs no more than what is present.

    Raises ArtifactError, with what is missing, where there is none: code for a missing feature
    would kill the process at its first instruction.
    """
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
    refused = sorted(absent & withheld)
    if refused:
        raise ArtifactError(
            f"this process may not use {', '.join(refused)}, which the artifact was built for",
            hint="the operating system refuses them: Linux before 5.16 and some sandboxes do; "
            "or compile for a lower level (llmc compile --target cpu:…)",
        )
    raise ArtifactError(
        f"this machine's {kind} lacks what the artifact was built for: {'; '.join(missing)}",
        hint="compile the model again on (or for) a machine like this one",
    )
