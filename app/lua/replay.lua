-- A page of a partition's log for one organisation, with the bounds that tell whether something is missing.
-- KEYS[1] the log. ARGV: key prefix, organisation, after (an id), entries to look at, check ('1': the id must be one
-- that stands here).
-- Answers {gap, last id looked at, its counter, how many were looked at, entries}. Entries of a task that is not there
-- any more are left out, but for the one that deleted it; also when its id was used again: they are older than what
-- has it now.
local PREFIX, ORG, after, count = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local PAGE_BYTES = 1048576
-- As `commit.lua` writes them: n, org, task, owner, user, agent, session, before, after, seq, seconds, microseconds …
local N, IN_ORG, TASK, AFTER, SECONDS, MICROS = 1, 2, 3, 9, 11, 12
local function head_of(entry) return cjson.decode(entry[2][2]) end
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
  if head_of(first)[N] ~= 1 then return { 'trimmed', after, number, '0', {} } end
else
  local at = redis.call('XRANGE', KEYS[1], after, after)[1]
  if at then
    number = string.format('%.0f', head_of(at)[N])
  elseif ARGV[5] == '1' then
    return { 'unknown', after, number, '0', {} }
  end
end

local function lives(entry, head)
  local created = redis.call('HGET', PREFIX .. 'task:' .. ORG .. ':' .. head[TASK], 'created_at')
  local ms = parts(entry[1])
  return created and math.max(head[SECONDS] * 1000000 + head[MICROS], ms * 1000) >= tonumber(created)
end

local entries, bytes, scanned = {}, 0, 0
while scanned < count and bytes < PAGE_BYTES do
  local found = redis.call('XRANGE', KEYS[1], '(' .. after, '+', 'COUNT', math.min(count - scanned, 50))
  if #found == 0 then break end
  for _, entry in ipairs(found) do
    if bytes >= PAGE_BYTES then break end
    scanned = scanned + 1
    local head = head_of(entry)
    after, number = entry[1], string.format('%.0f', head[N])
    if head[IN_ORG] == ORG and (head[AFTER] == 'gone' or lives(entry, head)) then entries[#entries + 1] = entry end
    bytes = bytes + #entry[2][4]
  end
end
return { '', after, number, tostring(scanned), entries }
