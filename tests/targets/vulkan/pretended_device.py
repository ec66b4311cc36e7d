"""Environments in which this machine's Vulkan device lacks, has or does what a test asks for."""

import json
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "device_layer.c"
LAYER = "VK_LAYER_LLMC_pretended_device"


class PretendedDevice:
    """Builds the layer in a folder; raises FileNotFoundError without a C compiler."""

    def __init__(self, folder):
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise FileNotFoundError("needs gcc: apt-get install g++")
        self._folder = folder
        library = folder / "device_layer.so"
        options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([compiler, *options, "-o", library, SOURCE], check=True)
        layer = {
            "name": LAYER,
            "type": "GLOBAL",
            "library_path": str(library),
            "api_version": "1.3.0",
            "implementation_version": "1",
            "description": "A device that lacks, has or does what a test asks for",
        }
        manifest = {"file_format_version": "1.1.2", "layer": layer}
        (folder / "device_layer.json").write_text(json.dumps(manifest))

    def environment(self, **options):
        """Variables for a process; the options are those of device_layer.c, in small letters."""
        named = {f"LLMC_TEST_{name.upper()}": str(value) for name, value in options.items()}
        return {"VK_LAYER_PATH": str(self._folder), "VK_INSTANCE_LAYERS": LAYER, **named}
