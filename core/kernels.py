"""`modelport.kernels`: the operations, one file each, in the folder `kernels/`.

The folder has no `__init__.py`: in a checkout it would shadow another package of that name, which transformers imports.
Finders take a plain folder for a subpackage only where it lies inside its parent, so this module says where it lies.
"""

from pathlib import Path

_here = Path(__file__).parent
_installed, _checkout = _here / "kernels", _here.parent / "kernels"
__path__ = [str(_installed if _installed.is_dir() else _checkout)]
