#!/usr/bin/env bash
# Create the user that containers run as, with its own home and directory for runs. If a user has the id already, it stays as it is:
# Ubuntu's images have a user with id 1000.
#
#   create_user.sh NAME USER_ID GROUP_ID
#
# Environment variables:
#   ROOT   the root of the file system that gets the user; a directory in tests   (default: /)
set -euo pipefail
name="${1:?create_user.sh NAME USER_ID GROUP_ID}" user_id="${2:?a numeric user id}" group_id="${3:?a numeric group id}"
root="${ROOT:-/}"
root="${root%/}"

fail() { printf 'create_user: %s\n' "$*" >&2; exit 1; }

[[ "$name" =~ ^[a-z_][a-z0-9_-]{0,30}$ ]] || fail "not a user name: $name"
for id in "$user_id" "$group_id"; do
  [[ "$id" =~ ^[1-9][0-9]{0,8}$ ]] || fail "ids are numbers, and not root's 0: $id"
done

# find_id FILE ID: print the name that has the id
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
# If a volume is mounted at /workspace/runs, the owner of the mount counts instead.
mkdir -p "$root/workspace/runs" "$root/workspace/data"
chown -R "$user_id:$group_id" "$root/workspace"
