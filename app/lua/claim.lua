-- Tasks for a worker: pops at most `free` of those that are ready, starts each and leases it, in one step.
-- KEYS[1] the partition's lease set. ARGV: claim id, free slots, lease (ms), organisation ('' for all), then per queue
-- its name, event (`started`), rows. Answers a list of {org, id, fence, snapshot}.
-- The same claim id again answers with the same tasks; fences tell whether they are still this worker's.
local claim, free, lease, only = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local kept = key('claim', claim)
local known = redis.call('GET', kept)
local function answer(claimed)
  for _, one in ipairs(claimed) do
    one[4] = redis.call('HGETALL', key('task', one[1] .. ':' .. one[2]))
  end
  return claimed
end
if known then return answer(cjson.decode(known)) end

local waiting, seen = {}, {}
for i = 7, #ARGV, 3 do
  local queue = only == '' and key('ready', ARGV[i]) or key('ready-of', only .. ':' .. ARGV[i])
  local found = redis.call('ZRANGEBYSCORE', queue, '-inf', digits(now_us()), 'WITHSCORES', 'LIMIT', 0, free)
  for j = 1, #found, 2 do
    if not seen[found[j]] then
      seen[found[j]] = true
      waiting[#waiting + 1] = { member = found[j], score = tonumber(found[j + 1]), queue = queue, at = i }
    end
  end
end
table.sort(waiting, function(a, b)
  if a.score ~= b.score then return a.score < b.score end
  return a.member < b.member
end)

local plans = {}
for i = 1, math.min(free, #waiting) do
  local one = waiting[i]
  local org, id = string.match(one.member, '^([^/]*)/(.*)$')
  local fields = load(org, id)
  local change = fields and row(ARGV[one.at + 2], fields.status)
  if change then
    local plan = { org = org, id = id, fields = fields, type = 'started', event = ARGV[one.at + 1], n = '', lease = lease }
    plan.change = change
    prepare(plan)
    plans[#plans + 1] = plan
  else
    -- Not ours, or damaged by hand: left in the queue it would stop every claim.
    redis.call('ZREM', one.queue, one.member)
  end
end
local claimed = {}
for i, plan in ipairs(plans) do
  write(plan)
  claimed[i] = { plan.org, plan.id, plan.after.fence }
end
if #claimed > 0 then redis.call('SET', kept, cjson.encode(claimed), 'EX', 60) end
return answer(claimed)
