#!/usr/bin/env bash
# Create the user that containers run as, with a home and a folder for runs that are its own. A user that has the id already stays as it
# is: Ubuntu's images bring one with 1000.
#
#   create_user.sh NAME USER_ID GROUP_ID
#
# Environment variables:
#   ROOT   the root of the file system that gets the user; the tests' is a folder   (default: /)
set -euo pipefail
name="${1:?create_user.sh NAME USER_ID GROUP_ID}" user_id="${2:?a numeric user id}" group_id="${3:?a numeric group id}"
root="${ROOT:-/}"
root="${root%/}"

fail() { printf 'create_user: %s\n' "$*" >&2; exit 1; }

[[ "$name" =~ ^[a-z_][a-z0-9_-]{0,30}$ ]] || fail "not a user name: $name"
for id in "$user_id" "$group_id"; do
  [[ "$id" =~ ^[1-9][0-9]{0,8}$ ]] || fail "ids are numbers, and not root's 0: $id"
done

# find_id FILE ID: the name that has it
find_id() { awk -F: -v id="$2" '$3 == id { print $1; exit }' "$root/etc/$1"; }

if [[ -z "$(find_id group "$group_id")" ]]; then
  groupadd ${root:+--prefix "$root"} --gid "$group_id" "$name"
fi
owner="$(find_id passwd "$user_id")"
if [[ -n "$owner" ]]; then
  echo "create_user: $user_id is $owner already"
else
  useradd ${root:+--prefix "$root"} --uid "$user_id" --gid "$group_id" --create-home --shell /bin/bash "$name"
fi
# Where /workspace/runs is mounted over, the mount's owner counts.
mkdir -p "$root/workspace/runs" "$root/workspace/data"
chown -R "$user_id:$group_id" "$root/workspace"
