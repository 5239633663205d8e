-- One event of an existing task. KEYS[1] its snapshot.
-- ARGV: org, id, type, event, rows, fence and producer number ('' when no worker speaks), operation ('' or a name
-- under which the outcome is kept 24 h), a set and the score in it that the caller saw (both '' without), submission
-- (of a new turn, else '').
-- Answers ok · duplicate · not_found · stale · out_of_order · conflict · text_full, then where the task stands.
local org, id, fence, n, operation = ARGV[3], ARGV[4], ARGV[8], ARGV[9], ARGV[10]
local set, score, submission = ARGV[11], ARGV[12], ARGV[13]
local fields = load(org, id)
if not fields then return { 'not_found', '0', '', '0', '', '0' } end
local function refuse(code)
  return { code, fields.last_seq, fields.last_event_id, '0', fields.status, fields.attempt }
end
-- Where the event with this producer number stands; a repeat follows closely, so only the last entries are looked at.
local function repeated()
  for _, entry in ipairs(redis.call('XREVRANGE', key('events', org .. ':' .. id), '+', '-', 'COUNT', 50)) do
    local said = {}
    for i = 1, #entry[2], 2 do said[entry[2][i]] = entry[2][i + 1] end
    if said['worker-n'] == n and said.fence == fence then
      return { 'duplicate', said.seq, entry[1], said.at, fields.status, fields.attempt }
    end
  end
  return { 'duplicate', '0', '', '0', fields.status, fields.attempt }
end
local outcome = key('outcome', org .. ':' .. id .. ':' .. operation)
if operation ~= '' then
  local known = redis.call('GET', outcome)
  if known then
    local reply = cjson.decode(known)
    reply[1] = 'duplicate'
    return reply
  end
end
if submission ~= '' and submission == fields.submission then return refuse('duplicate') end
if fence ~= '' then
  if fence ~= fields.fence then return refuse('stale') end
  if n ~= '' and tonumber(n) <= tonumber(fields.n or '0') then return repeated() end
  -- The fence rises only with the next start: between the end of an attempt and that, only the lease tells.
  if not redis.call('ZSCORE', key('leases'), org .. '/' .. id) then return refuse('stale') end
  if n ~= '' and tonumber(n) > tonumber(fields.n or '0') + 1 then return refuse('out_of_order') end
end
if set ~= '' and redis.call('ZSCORE', key(set), org .. '/' .. id) ~= score then return refuse('stale') end
local change = row(ARGV[7], fields.status)
if not change then return refuse('conflict') end
local plan = { org = org, id = id, fields = fields, change = change, type = ARGV[5], event = ARGV[6], n = n }
local problem = prepare(plan)
if problem then return refuse(problem) end
write(plan)
local reply = done(plan)
if operation ~= '' then redis.call('SET', outcome, cjson.encode(reply), 'EX', 86400) end
return reply
