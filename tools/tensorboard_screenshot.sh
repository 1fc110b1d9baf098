#!/usr/bin/env bash
# Pictures of a run's TensorBoard as a real browser shows it.
#
#   tools/tensorboard_screenshot.sh runs/digits/tb OUT_FOLDER
#
# Writes OUT_FOLDER/timeseries.png, scalars.png and images.png. Needs TensorBoard on PATH and
# Chromium (`apt-get install chromium`, or CHROMIUM=/path/to/it).
set -euo pipefail

logs=${1:?usage: tools/tensorboard_screenshot.sh LOG_FOLDER OUT_FOLDER}
out=${2:?usage: tools/tensorboard_screenshot.sh LOG_FOLDER OUT_FOLDER}
browser=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}
[[ -d $logs ]] || { echo "no such folder: $logs" >&2; exit 2; }
[[ -n $browser ]] || { echo "no Chromium on PATH; install it or set CHROMIUM" >&2; exit 2; }
mkdir -p "$out"

scratch=$(mktemp -d)
server=
cleanup() {
    if [[ -n $server ]]; then kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; fi
    rm -rf "$scratch"
}
trap cleanup EXIT

tensorboard --logdir "$logs" --host 127.0.0.1 --port 0 --load_fast=false \
    --samples_per_plugin images=100 >"$scratch/log" 2>&1 &
server=$!
url=
for _ in $(seq 120); do
    url=$(grep -oE 'http://127.0.0.1:[0-9]+/' "$scratch/log" | head -1 || true)
    [[ -n $url ]] && break
    kill -0 "$server" 2>/dev/null || { cat "$scratch/log" >&2; exit 1; }
    sleep 0.5
done
[[ -n $url ]] || { cat "$scratch/log" >&2; exit 1; }
# The first page load only makes sense once the event files have been read.
for _ in $(seq 120); do
    runs=$(python3 -c "import urllib.request as u; print(u.urlopen('${url}data/runs').read().decode())")
    [[ $runs != "[]" ]] && break
    sleep 0.5
done

for page in timeseries scalars images; do
    "$browser" --headless=new --no-sandbox --disable-gpu --hide-scrollbars \
        --user-data-dir="$scratch/profile" --window-size=1600,1800 \
        --virtual-time-budget=30000 --screenshot="$out/$page.png" "$url#$page" >"$scratch/$page" 2>&1 ||
        { cat "$scratch/$page" >&2; exit 1; }
    echo "wrote $out/$page.png"
done
