#!/usr/bin/env bash
# schemathesis: requests made from the OpenAPI document, right and wrong ones; none may make the server fail.
# usage: with_schemathesis.sh URL [EXAMPLES of each operation]
set -euo pipefail
schemathesis run "$1/openapi.json" --checks not_a_server_error --max-examples "${2:-400}" --phases examples,coverage,fuzzing \
  --mode all --request-timeout 60 --generation-deterministic
