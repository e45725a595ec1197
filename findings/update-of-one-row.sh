#!/usr/bin/env bash
# peewee 4.5.3: update() called on one row changes every row of its table.
#
# delete() and update() build a query for the whole table; delete_instance() and save() are what acts on
# one row. In 4.0.0 both could be called on an instance, and forgot it. In 4.5.3 delete() raises a
# TypeError there and update() does not: ann.update(name=...).execute() looks like one row and has no
# WHERE.
#
# Seen: 4.0.0: delete: DELETE FROM "user", update: 2 rows, names ['z', 'z']
#       4.5.3: delete: TypeError, update: 2 rows, names ['z', 'z']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv --without-pip "$work/venv"
cd "$work"
cat > rows.py <<'PY'
import peewee


class User(peewee.Model):
    name = peewee.TextField()

    class Meta:
        database = peewee.SqliteDatabase(":memory:")


User.create_table()
ann, _ = User.create(name="ann"), User.create(name="bob")
try:
    deleted = ann.delete().sql()[0]  # not executed
except TypeError:
    deleted = "TypeError"
changed = ann.update(name="z").execute()
names = [user.name for user in User.select()]
print(f"{peewee.__version__}: delete: {deleted}, update: {changed} rows, names {names}")
old = peewee.__version__ == "4.0.0"
assert deleted == ('DELETE FROM "user"' if old else "TypeError"), "the behaviour has changed"
assert (changed, names) == (2, ["z", "z"]), "the behaviour has changed"
PY
for version in 4.0.0 4.5.3; do
  python3 -m pip --python "$work/venv/bin/python" install -q peewee==$version
  "$work/venv/bin/python" rows.py
done
