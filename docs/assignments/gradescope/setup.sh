#!/usr/bin/env bash
set -e
apt-get update && apt-get install -y python3-venv
cd /autograder/source/starter && python3 -m venv ../venv && . ../venv/bin/activate
pip install "$(grep ^torch== requirements.txt)" --index-url https://download.pytorch.org/whl/cpu
pip install -r requirements.txt
