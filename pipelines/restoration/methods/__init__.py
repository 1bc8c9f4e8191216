"""Methods of restoration, by name; one file for each."""

from ddim_schedulers.pipelines.restoration.methods.ddnm import Ddnm
from ddim_schedulers.pipelines.restoration.methods.ddrm import Ddrm
from ddim_schedulers.pipelines.restoration.methods.dps import Dps
from ddim_schedulers.pipelines.restoration.methods.method import Method, Problem
from ddim_schedulers.pipelines.restoration.methods.mmps import Mmps
from ddim_schedulers.pipelines.restoration.methods.pigdm import Pigdm
from ddim_schedulers.pipelines.restoration.methods.repaint import RePaint

METHODS: dict[str, type[Method]] = {
    "ddnm": Ddnm,
    "ddrm": Ddrm,
    "repaint": RePaint,
    "dps": Dps,
    "pigdm": Pigdm,
    "mmps": Mmps,
}

__all__ = ["METHODS", "Ddnm", "Ddrm", "Dps", "Method", "Mmps", "Pigdm", "Problem", "RePaint"]
