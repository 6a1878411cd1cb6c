import sys,time
from . import debian, native, packages
from .places import *
t=time.time()
debian.get_all(); print("debian", time.time()-t)
native.check_abi()
for f in (native.build_system, native.build_cxxrt,native.build_loader,native.build_metalsim,native.build_accelerate):
    f(); print(f.__name__, time.time()-t,flush=True)
for v in packages.VERSIONS: packages.get_mlx(v, PYTHONS["3.11"])
packages.get_mlx("0.32.4", PYTHONS["3.13"])
for p in PYTHONS.values(): packages.get_ours(p)
print("mlx", time.time()-t)
for v in packages.PAIRS: packages.get_site(v)
print("site", time.time()-t)
