#!/bin/sh
# What a RayJob runs (infra/kubernetes/job): the pipeline on the code of the image, results to the bucket.
# DVC_REMOTE_URL: s3://bucket/prefix. A second run finds what the first one made and goes on from there.
set -eu
cd "$(dirname "$0")/.."
: "${DVC_REMOTE_URL:?set it to s3://bucket/prefix}"
dvc() { python -m pipelines.project.dvc_command "$@"; } # what it takes from the bucket is checked
dvc remote add --local --force --default storage "$DVC_REMOTE_URL"
status=0
dvc repro --pull || status=$?
dvc push --run-cache # after a failure too: the next attempt goes on after the stages that ended well
exit $status
