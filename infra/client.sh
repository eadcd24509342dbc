# shellcheck shell=sh
# For a shell in the project's folder: `. infra/client.sh` points Ray, MLflow and S3 at infra/compose.yaml.
secret() { sed -n "s/^$1=//p" infra/.env; }
RAY_AUTH_TOKEN=$(secret RAY_TOKEN)
MLFLOW_TRACKING_PASSWORD=$(secret MLFLOW_PASSWORD)
AWS_ACCESS_KEY_ID=$(secret S3_ACCESS_KEY_ID)
AWS_SECRET_ACCESS_KEY=$(secret S3_SECRET_ACCESS_KEY)
export RAY_AUTH_TOKEN MLFLOW_TRACKING_PASSWORD AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
export RAY_ADDRESS=http://127.0.0.1:8265 RAY_AUTH_MODE=token
export MLFLOW_TRACKING_URI=http://127.0.0.1:5000 MLFLOW_TRACKING_USERNAME=admin
export AWS_ENDPOINT_URL=http://127.0.0.1:3900 AWS_DEFAULT_REGION=us-east-1
unset -f secret
unset AWS_PROFILE AWS_SESSION_TOKEN
