-- A page of a partition's log for one organisation, with the bounds that tell whether something is missing.
-- KEYS[1] the log. ARGV: key prefix, organisation, after (an id), entries to look at, check ('1': the id must be one
-- that stands here).
-- Answers {gap, last id looked at, its counter, how many were looked at, entries}. Entries of a task that is not there
-- any more are left out, also when its id was used again: they are older than what has it now.
local PREFIX, ORG, after, count = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local PAGE_BYTES = 1048576
local function value(entry, name)
  for i = 1, #entry[2], 2 do
    if entry[2][i] == name then return entry[2][i + 1] end
  end
end
local function parts(id)
  local ms, n = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(n)
end
local function before(a, b)
  local ams, an = parts(a)
  local bms, bn = parts(b)
  return ams < bms or (ams == bms and an < bn)
end

local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not last then return { after == '0-0' and '' or 'ahead', '0-0', '0', '0', {} } end
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
local number = '0'
if before(last[1], after) then return { 'ahead', after, number, '0', {} } end
if before(after, first[1]) then
  if value(first, 'n') ~= '1' then return { 'trimmed', after, number, '0', {} } end
else
  local at = redis.call('XRANGE', KEYS[1], after, after)[1]
  if at then
    number = value(at, 'n')
  elseif ARGV[5] == '1' then
    return { 'unknown', after, number, '0', {} }
  end
end

local function lives(entry)
  local created = redis.call('HGET', PREFIX .. 'task:' .. ORG .. ':' .. value(entry, 'task'), 'created_at')
  if not created then return false end
  local seconds, micros = string.match(value(entry, 'us'), '^(%d+) (%d+)$')
  local ms = parts(entry[1])
  return math.max(tonumber(seconds) * 1000000 + tonumber(micros), ms * 1000) >= tonumber(created)
end

local entries, bytes, scanned = {}, 0, 0
while scanned < count and bytes < PAGE_BYTES do
  local found = redis.call('XRANGE', KEYS[1], '(' .. after, '+', 'COUNT', math.min(count - scanned, 50))
  if #found == 0 then break end
  for _, entry in ipairs(found) do
    if bytes >= PAGE_BYTES then break end
    scanned = scanned + 1
    after, number = entry[1], value(entry, 'n')
    if value(entry, 'org') == ORG and value(entry, 'after') ~= 'gone' and lives(entry) then
      entries[#entries + 1] = entry
    end
    bytes = bytes + #value(entry, 'event')
  end
end
return { '', after, number, tostring(scanned), entries }
