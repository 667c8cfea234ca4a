#!/usr/bin/env bash
# Divides archives into parts of a limited size: PARTS/1, PARTS/2, ..., each with what unpacks it and its check sums.
#
#   bash examples/install/gpu_offline/divide.sh PARTS BYTES FOLDER...
#
# Each FOLDER of *.tar.xz begins a new part; an archive larger than BYTES is cut. Parts of an earlier call are
# replaced; a PARTS that holds anything else is refused.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
parts=$1 limit=$2
shift 2
fail() { echo "gpu_offline: $*" >&2; exit 1; }

if [ -e "$parts" ]; then
  [ -d "$parts" ] || fail "PARTS=$parts is a file"
  for old in "$parts"/* "$parts"/.[!.]*; do
    [ -e "$old" ] || continue
    case ${old##*/} in *[!0-9]*) fail "PARTS=$parts holds ${old##*/}, which is no part: name a folder for parts alone" ;; esac
    [ -f "$old/unpack.sh" ] || fail "PARTS=$parts holds ${old##*/}, which is no part: name a folder for parts alone"
  done
  rm -rf "$parts"
fi
mkdir -p "$parts"
cut=$(mktemp -d)
trap 'rm -rf "$cut"' EXIT

part=0 used=0 new=1
place() { # a file and its name there
  local size
  size=$(stat -c %s "$1")
  if [ $new = 1 ] || [ $((used + size)) -gt "$limit" ]; then
    part=$((part + 1)) used=0 new=0
    mkdir -p "$parts/$part"
    cp "$here/unpack.sh" "$parts/$part/"
  fi
  cp "$1" "$parts/$part/$2"
  (cd "$parts/$part" && sha256sum "$2" >>SHA256SUMS)
  used=$((used + size))
}
for folder in "$@"; do
  new=1
  for file in "$folder"/*.tar.xz; do
    [ -e "$file" ] || fail "no archives in $folder"
    name=$(basename "$folder")-$(basename "$file")
    if [ "$(stat -c %s "$file")" -gt "$limit" ]; then
      split -b "$limit" -a 3 -d "$file" "$cut/$name."
      for piece in "$cut/$name".*; do place "$piece" "$(basename "$piece")"; done
      touch "$parts/$part/$name.last" # says that the piece before it ends the archive
      rm "$cut/$name".*
    else
      place "$file" "$name"
    fi
  done
done
echo "$part parts in $parts; carry each over with the checkout and run there, in this order:"
for n in $(seq 1 "$part"); do
  echo "  bash $parts/$n/unpack.sh && . /tmp/site/env.sh   # $(du -sm "$parts/$n" | cut -f1) MB"
done
