-- A page of a task's history, read together with the bounds that tell whether something is missing.
-- KEYS[1] the task's events, KEYS[2] its snapshot, KEYS[3] its base, KEYS[4] the partition's log.
-- ARGV: after (an id; '' from the start; 'seq:N'), page size, check ('1': the id must be one that we gave).
-- Answers {status, last_seq, last_event_id, base_seq, base_event_id, gap, entries}; no such task: {}.
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
  -- Sequence numbers are dense, so the place is a count, from whichever end is nearer.
  if seq == last_seq then return answer('', {}) end
  local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
  local first_seq = base_seq + 1
  for i = 1, #first[2], 2 do
    if first[2][i] == 'seq' then first_seq = tonumber(first[2][i + 1]) end
  end
  local skip = seq - first_seq + 1
  if skip <= 0 then
    after = ''
  elseif last_seq - seq < skip then
    local tail = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', last_seq - seq + 1)
    after = tail[#tail][1]
  else
    local head = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', skip)
    after = head[#head][1]
  end
elseif after ~= '' then
  if before(task[3], after) then return answer('ahead', {}) end
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
return answer('', redis.call('XRANGE', KEYS[1], after == '' and '-' or '(' .. after, '+', 'COUNT', count))
