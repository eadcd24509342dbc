#!/bin/sh
# Write infra/.env: infra/.env.example with a random value for every empty one, for its owner's eyes only.
set -eu
cd "$(dirname "$0")"
if [ -e .env ]; then
    echo "error: infra/.env exists; the servers' volumes know its passwords: remove both to start afresh" >&2
    exit 1
fi
umask 077
random_hex() { od -An -v -N "$1" -tx1 /dev/urandom | tr -d ' \n'; }
while IFS= read -r line; do
    case $line in
        S3_ACCESS_KEY_ID=) line=${line}GK$(random_hex 12) ;; # the form Garage's keys have
        [A-Z]*=) line=$line$(random_hex 32) ;;
    esac
    printf '%s\n' "$line"
done < .env.example > .env.tmp
mv .env.tmp .env
