"""The paper's claims, each tried in small: `make claims`. What every study shares is in study.py, its models in small.py."""

from studies.claims import compression, filtering, packing, preference, real, reweighting, scaling, stages, voting

_MODULES = (scaling, compression, reweighting, filtering, packing, preference, voting, stages, real)
STUDIES = {module.STUDY.name: module.STUDY for module in _MODULES}
