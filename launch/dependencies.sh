#!/bin/bash
# Packages that building and testing need, on Debian 12 and its relatives. Sourced by
# launch/quickstart.sh and tests/run.sh; run directly it installs the build packages.

readonly kBuildPackages=(
  ca-certificates cmake g++ libcli11-dev libdnnl-dev libgoogle-glog-dev libopenmpi-dev libpng-dev
  libprotobuf-dev libxxhash-dev ninja-build nlohmann-json3-dev openmpi-bin pkg-config
  protobuf-compiler
)
readonly kTestPackages=(ccache libgtest-dev python3 python3-protobuf python3-xxhash xz-utils)

# install_packages PACKAGE...: installs what is missing and says what that is.
install_packages() {
  local missing=() package
  if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    echo "This script installs packages with apt-get, which this system does not have." >&2
    echo "Install the equivalents of these Debian 12 packages, then run it again with" >&2
    echo "LONGSPAN_SKIP_INSTALL=1: $*" >&2
    return 1
  fi
  for package in "$@"; do
    [[ $(dpkg-query -W -f='${Status}' "$package" 2>/dev/null) == "install ok installed" ]] ||
      missing+=("$package")
  done
  if ((${#missing[@]} == 0)); then
    echo "packages: all ${#} are installed"
    return 0
  fi
  echo "packages: installing ${missing[*]}"
  local root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || {
      echo "Not root and no sudo: ask an administrator to install ${missing[*]}" >&2
      return 1
    }
    root=(sudo)
  fi
  "${root[@]}" apt-get update -qq &&
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null >/dev/null ||
    {
      echo "apt-get could not install ${missing[*]}" >&2
      return 1
    }
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then install_packages "${kBuildPackages[@]}"; fi
