"""Makes torchvision importable beside a CPU build of torch.

`transformers` and `lpips` import torchvision. The builds of torchvision on PyPI are made for CUDA: their extension
does not load beside a CPU build of torch, and then `import torchvision` itself fails, because it describes operators
of that extension. Declaring the operators, without an implementation, is all that the import needs; nothing here uses
them. Where torchvision is whole, nothing is declared.
"""

import importlib.util
import re


def declare_missing_operators() -> None:
    import torch

    while True:
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing[1], "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        else:
            return


if importlib.util.find_spec("torch") and importlib.util.find_spec("torchvision"):
    declare_missing_operators()
