-- A page of a task's history, read together with the bounds that tell whether something is missing.
-- KEYS[1] the task's events, KEYS[2] its snapshot, KEYS[3] its base, KEYS[4] the partition's log.
-- ARGV: after (an id; '' from the start; 'seq:N'), page size, check ('1': the id must be one that we gave).
-- Answers {status, last_seq, last_event_id, base_seq, base_event_id, gap, entries}; no such task: {}.
local PAGE_BYTES = 1048576
local task = redis.call('HMGET', KEYS[2], 'status', 'last_seq', 'last_event_id', 'size')
if not task[1] then return {} end
local base = redis.call('HMGET', KEYS[3], 'last_seq', 'last_event_id')
local last_seq, base_seq = tonumber(task[2]), tonumber(base[1] or '0')
local after, count = ARGV[3], tonumber(ARGV[4])

local function answer(gap, entries)
  return { task[1], task[2], task[3], base[1] or '0', base[2] or '', gap, entries }
end
local function before(a, b)
  local ams, an = string.match(a, '^(%d+)-(%d+)$')
  local bms, bn = string.match(b, '^(%d+)-(%d+)$')
  ams, an, bms, bn = tonumber(ams), tonumber(an), tonumber(bms), tonumber(bn)
  return ams < bms or (ams == bms and an < bn)
end

local seq = string.match(after, '^seq:(%d+)$')
if seq then
  seq = tonumber(seq)
  if seq > last_seq then return answer('ahead', {}) end
  if seq < base_seq then return answer('trimmed', {}) end
  if seq == last_seq then return answer('', {}) end
  -- Bisects by time: the last millisecond whose first entry is not after seq holds the entry number seq.
  local function first_at(from, to)
    local found = redis.call('XRANGE', KEYS[1], from, to, 'COUNT', 1)[1]
    if not found then return nil end
    for i = 1, #found[2], 2 do
      if found[2][i] == 'seq' then return tonumber(found[2][i + 1]), found[1] end
    end
  end
  local first_seq, first_id = first_at('-', '+')
  if first_seq > seq then
    after = ''
  else
    local low, high = tonumber(string.match(first_id, '^%d+')), tonumber(string.match(task[3], '^%d+'))
    while low < high do
      local middle = math.ceil((low + high) / 2)
      local found = first_at(string.format('%.0f', middle), '+')
      if found and found <= seq then low = middle else high = middle - 1 end
    end
    local ms = string.format('%.0f', low)
    local found, id = first_at(ms, ms)
    while found < seq do found, id = first_at('(' .. id, ms) end
    after = id
  end
elseif after ~= '' then
  if before(task[3], after) then
    -- The place of another task's entry, from a stream of both, is later than this one's last: nothing is missing.
    local other = redis.call('XRANGE', KEYS[4], after, after)[1]
    local head = other and cjson.decode(other[2][2]) -- n, org, task …
    local missing = not other or KEYS[2] == ARGV[1] .. 'task:' .. head[2] .. ':' .. head[3]
    return answer(missing and 'ahead' or '', {})
  end
  if base[1] and before(after, base[2]) then return answer('trimmed', {}) end
  if ARGV[5] == '1' and after ~= task[3] and after ~= base[2] then
    local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
    local earlier = first and before(after, first[1])
    if not earlier and #redis.call('XRANGE', KEYS[1], after, after) == 0
      and #redis.call('XRANGE', KEYS[4], after, after) == 0 then
      return answer('unknown', {})
    end
  end
elseif base[1] then
  return answer('trimmed', {})
end
-- In small steps, so that a page of large events ends at PAGE_BYTES and not at 500 × 256 KiB.
local entries, bytes, from = {}, 0, after == '' and '-' or '(' .. after
while #entries < count and bytes < PAGE_BYTES do
  local found = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', math.min(count - #entries, 50))
  if #found == 0 then break end
  for _, entry in ipairs(found) do
    if bytes >= PAGE_BYTES then break end
    entries[#entries + 1] = entry
    for i = 2, #entry[2], 2 do bytes = bytes + #entry[2][i] end
  end
  from = '(' .. entries[#entries][1]
end
return answer('', entries)
