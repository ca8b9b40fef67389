#!/usr/bin/env bash
# with_driver.sh PYTHON ARGUMENTS ...: runs Python with the stand-in for the CUDA runtime of driver.c.
#
# PYTHON belongs to an environment with a CUDA build of torch. gcc builds the stand-in beside it, with the headers that
# torch's own packages bring: the structs from its CUDA runtime, what these include from triton.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python=$1
shift
site="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
for headers in "$site"/nvidia/cu*/include; do [[ -f "$headers/driver_types.h" ]] && break; done
if [[ ! -f "$headers/driver_types.h" ]]; then
    echo "with_driver.sh: the torch of $python is no CUDA build: its packages have no driver_types.h" >&2
    exit 2
fi
library="$site/quadriga_driver.so"
gcc -shared -fPIC -O1 -I"$headers" -I"$site/triton/backends/nvidia/include" "$here/driver.c" \
    -Wl,-soname,libcuda.so.1 -o "$library.$$"
mv "$library.$$" "$library"
LD_PRELOAD="$library" exec "$python" "$@"
