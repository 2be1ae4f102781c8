"""`ddmd info`: versions, what is compiled in, devices, backends of the ops, and the weights."""

from __future__ import annotations

import platform
from typing import Any

from ddmd.cli import console, startup
from ddmd.cli.options import Debug, Json

# Of the weights in the package; ddmd/pretrained/LICENSE.md is its text.
LICENCE = "CC BY-NC-SA 4.0: research only, not commercial; see LICENSE.md beside the file"


def command(json: Json = False, debug: Debug = False) -> None:
    """Versions, devices, backends of the ops, and weights."""
    facts = _facts()
    if json:
        console.json_value(facts)
        return
    console.say(
        f"ddmd {facts['ddmd']}, Python {facts['python']}, torch {facts['torch']}, numpy {facts['numpy']}"
    )
    build = facts["build"]
    if build:
        cuda = f"CUDA {build['cuda']} for sm_{build['cuda_architectures']}" if build["cuda"] else "no CUDA"
        console.say(f"built with {build['compiler']}, {', '.join(build['simd'])}; {cuda}")
    else:
        console.say(f"not built: {facts['not_built']}")
    console.say(f"devices: {', '.join(facts['devices'])}")
    if len(facts["devices"]) == 1:
        console.say("no CUDA device: the cuda column says what would serve")
    rows = [(op, s["cpu"], s["cuda"], "; ".join(s["reasons"])) for op, s in facts["ops"].items()]
    console.table(("op", "cpu", "cuda", "why not faster"), rows)
    for name, weights in facts["weights"].items():
        taken = ", ".join(weights["sequences"])
        console.say(
            f"weights {name}: takes {'any of ' if weights['any'] else ''}{taken}; from {weights['file']}"
        )
        console.say(f"  licence: {weights['licence']}")
        for key, value in weights["training"].items():
            if not isinstance(value, dict):  # of systems that were averaged: in the JSON alone
                console.say(f"  {'licences of the data' if key == 'licence' else key}: {value}")


def _facts() -> dict[str, Any]:
    with startup.quick_imports():
        import numpy
        import torch

        import ddmd
        from ddmd import ops
        from ddmd.models import checkpoint
        from ddmd.ops import native

    served = {}
    for op in ops.OPS:
        by_device = {device: ops.serving(op, device) for device in ("cpu", "cuda")}
        served[op] = {device: name for device, (name, _) in by_device.items()} | {
            "reasons": sorted({reason for _, reason in by_device.values() if reason})
        }
    weights = {}
    for name in checkpoint.available():
        description = checkpoint.describe(checkpoint.find(name))
        weights[name] = {
            "sequences": list(description.sequences),
            "any": bool(description.optional_sequences),
            "file": str(checkpoint.find(name)),
            "licence": LICENCE,
            "training": dict(description.training),
        }
    build = native.build_info()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "ddmd": ddmd.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "build": build or None,
        "not_built": None if build else native.why_not(),
        "devices": [f"cpu ({torch.get_num_threads()} threads)", *gpus],
        "ops": served,
        "weights": weights,
    }
