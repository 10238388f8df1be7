"""What the registry on Redis asks of a server: scripts that change and read the keys of a realm, each in one step.

The keys of a realm, each part quoted::

    onehop:<realm>:record:<service>:<node id>   the record, behind a number that grows; lives for a lease
    onehop:<realm>:nodes:<service>              sorted set of node ids, by the time at which their leases end
    onehop:<realm>:count:<service>              grows by one with each change of the service
    onehop:<realm>:services                     sorted set of services, by the time until which each is worth a look

and the channels ``onehop:<realm>:<database>:change:<service>``.
"""

from __future__ import annotations

import hashlib

from onehop.registry.leased import quoted, unquoted
from onehop.settings import Settings

KEPT_LEASES = 10  # leases for which what is common to a service's records stays behind the last of them

Value = bytes | int | str
Command = tuple[Value, ...]

# --- what the server does in one step ---

_COMMON = """
local record, nodes, count, services = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local channel, lease, kept = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function text(number)  -- Lua itself writes 14 digits only
    return string.format('%.0f', number)
end

local function begin_count()
    -- A count that was lost goes on far beyond where it was, so that nobody takes it for the same.
    redis.call('SET', count, text(time[1] * 1000000 + time[2]), 'NX')
    redis.call('PEXPIRE', count, kept)
end

local function changed(what, node, value)
    begin_count()
    local number = redis.call('INCR', count)
    redis.call('PUBLISH', channel, text(number) .. ' ' .. what .. ' ' .. node .. ' ' .. value)
end

local function number_of(value)
    return value and tonumber(string.match(value, '^(%d+) '))
end

local function current()
    local value = redis.pcall('GET', record)
    return type(value) == 'string' and value or false  -- somebody else's list is as good as nothing
end

local function strange()  -- the key that holds something else than what belongs there
    for key, kind in pairs({[nodes] = 'zset', [count] = 'string'}) do
        local found = redis.call('TYPE', key).ok
        if found ~= 'none' and found ~= kind then
            return key
        end
    end
    return not string.match(redis.call('GET', count) or '0', '^%d+$') and count
end

local function live(service, node)
    local new = redis.call('ZADD', nodes, now + lease, node) == 1
    if new or redis.call('PTTL', nodes) < kept / 2 then  -- what all have in common, one of them now and then
        redis.call('PEXPIRE', nodes, kept)
        redis.call('PEXPIRE', count, kept)
        redis.call('ZADD', services, now + kept, service)
        redis.call('ZREMRANGEBYSCORE', services, '-inf', now)
        redis.call('PEXPIRE', services, kept)
    end
    return new
end

local function reap(prefix)
    for _, node in ipairs(redis.call('ZRANGEBYSCORE', nodes, '-inf', now, 'LIMIT', 0, 1000)) do
        local left = redis.call('PTTL', prefix .. node)
        if left == -2 then
            redis.call('ZREM', nodes, node)
            changed('expired', node, '')
        else
            redis.call('ZADD', nodes, now + math.max(left, lease), node)
        end
    end
end
"""

# KEYS: as named above. ARGV: channel, milliseconds of a lease, milliseconds for which the common keys stay, and then
# what each script names.
_PUT = """
local service, node, number, value = ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local before = current()
local before_number = number_of(before)
if before_number and before_number > tonumber(number) then
    return 0  -- this was on its way for long, and was overtaken
end
if before_number then
    redis.call('PEXPIRE', record, lease)  -- a script that has written may write on where no memory is left
end
redis.call('SET', record, number .. ' ' .. value, 'PX', lease)
local new = live(service, node)
if new or not before_number or string.sub(before, string.find(before, ' ') + 1) ~= value then
    changed('put', node, value)
end
return 1
"""
_REMOVE = """
local node, number = ARGV[4], ARGV[5]
local before_number = number_of(current())
if before_number and before_number > tonumber(number) then
    return 0  -- as above: a late removal does not take away a newer record
end
if redis.call('DEL', record) + redis.call('ZREM', nodes, node) > 0 then
    changed('withdrawn', node, '')
end
return 1
"""
_RENEW = """
local service, node, number, prefix = ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local value = current()
if number_of(value) ~= tonumber(number) then
    return 0
end
redis.call('PEXPIRE', record, lease)
if live(service, node) then
    changed('put', node, string.sub(value, string.find(value, ' ') + 1))
end
reap(prefix)
return 1
"""
_ASK = """
if strange() then
    return '0'
end
reap(ARGV[4])
return redis.call('GET', count) or '0'
"""
_READ = """
local key = strange()
if key then
    return {'0', key}
end
begin_count()  -- so that the first change is the next one for whoever has read before it
local prefix, answer = ARGV[4], {redis.call('GET', count)}
local all = redis.call('ZRANGE', nodes, 0, -1)
for first = 1, #all, 1000 do
    local keys = {}
    for each = first, math.min(first + 999, #all) do
        keys[#keys + 1] = prefix .. all[each]
    end
    for each, value in ipairs(redis.call('MGET', unpack(keys))) do
        if value then
            answer[#answer + 1] = all[first + each - 1]
            answer[#answer + 1] = value
        end
    end
end
return answer
"""


class _Script:
    def __init__(self, body: str) -> None:
        self.source = (_COMMON + body).encode()
        self.name = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()


_put, _remove, _renew, _ask, _read = SCRIPTS = [_Script(each) for each in (_PUT, _REMOVE, _RENEW, _ASK, _READ)]


class Keys:
    """The names of one realm's keys, and the calls of the scripts with them."""

    def __init__(self, settings: Settings, database: int) -> None:
        self._realm = f"onehop:{quoted(settings.realm or 'default')}"
        self._lease = round(settings.lease * 1000)
        self.services = f"{self._realm}:services"
        self.strange: set[str] = set()  # those that were warned of
        self._changes = f"{self._realm}:{database}:change:"

    def channel(self, service: str) -> str:
        return self._changes + quoted(service)

    def subscription(self, service: str) -> tuple[str, str]:
        """The command, and what it subscribes to: all services where the name is empty."""
        return ("SUBSCRIBE", self.channel(service)) if service else ("PSUBSCRIBE", self._changes + "*")

    def service(self, channel: bytes) -> str | None:
        """Whose channel this is; None where it is none of ours."""
        return service_named(channel.removeprefix(self._changes.encode()))

    def prefix(self, service: str) -> str:
        return f"{self._realm}:record:{quoted(service)}:"

    def put(self, service: str, node: str, number: int, value: bytes) -> Command:
        return self._call(_put, service, node, quoted(service), node, number, value)

    def remove(self, service: str, node: str, number: int) -> Command:
        return self._call(_remove, service, node, node, number)

    def renew(self, service: str, node: str, number: int) -> Command:
        return self._call(_renew, service, node, quoted(service), node, number, self.prefix(service))

    def ask(self, service: str) -> Command:
        return self._call(_ask, service, "", self.prefix(service))

    def read(self, service: str) -> Command:
        return self._call(_read, service, "", self.prefix(service))

    def _call(self, script: _Script, service: str, node: str, *arguments: Value) -> Command:
        part = quoted(service)
        keys = (
            self.prefix(service) + node,
            f"{self._realm}:nodes:{part}",
            f"{self._realm}:count:{part}",
            self.services,
        )
        common = (self.channel(service), self._lease, KEPT_LEASES * self._lease)
        return ("EVALSHA", script.name, len(keys), *keys, *common, *arguments)


def service_named(part: bytes) -> str | None:
    """The service whose quoted name this is; None where it is none."""
    service = unquoted(part.decode("ascii", "replace"))
    return service if service and quoted(service).encode() == part else None
