# shellcheck shell=bash
# What the scripts share: messages, and installing what is missing.

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$'\e[1m' green=$'\e[32m' yellow=$'\e[33m' red=$'\e[31m' plain=$'\e[0m'
else
    bold='' green='' yellow='' red='' plain=''
fi

# Debian's packages, by what they are needed for.
# shellcheck disable=SC2034  # the scripts that read this file use them
{
    BUILD_PACKAGES=(gcc libc6-dev protobuf-compiler libprotobuf-dev clang-14 libbpf-dev)
    RUN_PACKAGES=(nftables iproute2 util-linux)
    TEST_PACKAGES=(curl etcd-server etcd-client iputils-ping strace procps shellcheck bind9-dnsutils
        busybox-static musl-tools)
    VM_PACKAGES=(qemu-system-x86 cpio kmod busybox-static ipvsadm)
    DEMO_PACKAGES=(etcd-server etcd-client iputils-ping iperf3 procps)
    BENCH_PACKAGES=(iperf3 tcpdump containernetworking-plugins kmod knot nsd unbound dnsmasq-base
        aardvark-dns dnsperf iptables)
}

# The test programs that run in the virtual machine (scripts/vm) too, with the tests that need its
# kernel: there NETCTL_VM is set.
# shellcheck disable=SC2034
VM_TESTS=(netns ipvs ebpf)

# The oldest Rust that builds netctl: rust-version in Cargo.toml.
RUST_VERSION=1.95

step() { printf '%s==> %s%s\n' "$bold" "$*" "$plain"; }
good() { printf '%s%s%s\n' "$green" "$*" "$plain"; }
warn() { printf '%s%s%s\n' "$yellow" "$*" "$plain" >&2; }

die() {
    printf '%s%s: %s%s\n' "$red" "${0##*/}" "$*" "$plain" >&2
    exit 1
}

need_root() {
    [ "$(id -u)" = 0 ] || die "this makes network namespaces: run it as root (sudo $0)"
}

# Installs the named Debian packages that are not there yet.
need_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed ||
            missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    command -v apt-get >/dev/null ||
        die "these are missing and there is no apt-get to install them: ${missing[*]}"
    [ "$(id -u)" = 0 ] || die "these packages are missing: apt-get install ${missing[*]}"
    step "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    local install=(apt-get install -y --no-install-recommends "${missing[@]}")
    # On a fresh machine the lists of packages are missing or old.
    "${install[@]}" || { apt-get update && "${install[@]}"; }
    # Debian starts what it installs; only our own, in namespaces, are wanted.
    if [ -d /run/systemd/system ]; then
        local pair
        for pair in etcd-server=etcd knot=knot nsd=nsd unbound=unbound; do
            [[ " ${missing[*]} " != *" ${pair%=*} "* ]] || systemctl disable --now "${pair#*=}"
        done
    fi
}

# Installs Rust in the user's own directory, as its makers do.
install_rust() {
    local installer home
    # Under sudo the one of whoever asked will do.
    home=$(getent passwd "${SUDO_USER:-}" | cut -d: -f6) || true
    if [ -n "$home" ] && [ -x "$home/.cargo/bin/cargo" ]; then
        export RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup}
        PATH=$PATH:$home/.cargo/bin
        return
    fi
    need_packages ca-certificates curl
    step "installing Rust in $HOME/.cargo"
    installer=$(mktemp)
    if ! curl --proto '=https' --tlsv1.2 -sSf -o "$installer" https://sh.rustup.rs ||
        ! sh "$installer" -y --no-modify-path --profile minimal --component clippy,rustfmt; then
        rm -f "$installer"
        die "Rust could not be installed: install version $RUST_VERSION or newer (https://rustup.rs)"
    fi
    rm -f "$installer"
    PATH=$PATH:$HOME/.cargo/bin
    hash -r
}

# Sees to it that cargo is there and new enough.
need_rust() {
    local found
    [ -d "$HOME/.cargo/bin" ] && PATH=$PATH:$HOME/.cargo/bin
    command -v cargo >/dev/null || install_rust
    found=$(cargo --version | cut -d' ' -f2)
    [ "$(printf '%s\n' "$RUST_VERSION" "$found" | sort -V | head -1)" = "$RUST_VERSION" ] ||
        die "Rust $found is too old: netctl needs $RUST_VERSION or newer (rustup update)"
}
